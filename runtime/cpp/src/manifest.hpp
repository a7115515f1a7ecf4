// The bundle's contract: manifest.json, what it may say, and the checks before anything it names is opened.
// Mirrors dit_runtime/bundle/manifest.py.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "schedule.hpp"

namespace dit_runtime {

using Path = std::filesystem::path;
using Shape = std::vector<std::int64_t>;

inline constexpr std::uint64_t FORMAT = 1;
inline const char* const MANIFEST = "manifest.json";
inline constexpr std::uintmax_t MANIFEST_BYTES = 64u << 20;  // more is no manifest
inline constexpr std::int64_t MOST = 1 << 24;                // of classes, rows, training steps
inline constexpr std::int64_t ROW_MOST = 1 << 26;  // numbers a row: of a caption of 300 tokens XL/2 has 19 million

// One input or output; a name in the shape is a free dimension.
struct TensorSpec {
    std::string name;
    std::string dtype;
    std::vector<std::variant<std::int64_t, std::string>> shape;
};

// With what and for what an engine was built; it is opened nowhere else.
struct Built {
    std::string version;                            // of the backend
    std::int64_t cuda = 0;                          // that the driver must have
    std::vector<std::string> compute_capabilities;  // "8.9", or "8.0+" and later; none: any
    bool version_compatible = false;                // opens in later versions too
    bool weight_streaming = false;                  // its weights may be larger than the GPU's memory
};

// One network of the bundle: its portable ONNX form, and the files that each backend opens instead of it.
struct Graph {
    std::string onnx;
    std::vector<TensorSpec> inputs, outputs;
    std::int64_t max_batch = 8;  // rows it takes at a time
    std::string precision = "fp32";
    std::string backend = "onnxruntime";
    std::map<std::string, std::vector<std::string>> engines;  // by backend
    std::map<std::string, Built> built;                       // by backend, where the engines are for one kind of GPU

    std::vector<std::string> onnx_files() const { return {onnx, onnx + ".data"}; }
    std::vector<std::string> files(const std::string& name) const {
        const auto own = engines.find(name);
        return own == engines.end() ? onnx_files() : own->second;
    }
    std::vector<std::string> files() const { return files(backend); }
};

struct File {
    std::uintmax_t size;
    std::string sha256;
};

struct Manifest {
    std::string model_name;           // for people
    Shape latent_shape;               // (C, H, W)
    std::int64_t num_classes = 0;     // where there are captions: the examples that verification has instead
    std::vector<std::string> labels;  // names by class; empty where none are known
    std::int64_t guided_channels = 0;
    bool unguided_up_to_one = false;
    Diffusion diffusion;
    std::map<std::string, Graph> graphs;
    std::map<std::string, File> files;

    std::int64_t null_label() const { return num_classes; }
    Shape conditioning_shape() const;  // (K, D)
    Shape context_shape() const;       // (M, D), where there are captions
    // (L, C) of the captions that a bundle takes instead of labels; empty where it takes labels.
    Shape caption_shape() const;
    Shape image_shape() const;  // (3, H, W), where there is a decoder
};

// Parses and checks the manifest, and that each file it names is there in its size; opens none of them.
Manifest read(const Path& folder);

// The same for the text alone: what it says, and no file is looked for. `where` begins each message.
Manifest parse(const std::string& content, const std::string& where);

// The `diffusion` section alone, from JSON.
Diffusion parse_diffusion(const std::string& content);

// The file `name` of the bundle; nothing may lead out of the folder.
Path inside(const Path& folder, const std::string& name);

// Compares sha256 sums; engines are executable, so nothing is opened before.
void check_files(const Path& folder, const Manifest& manifest, const std::vector<std::string>& names);

}  // namespace dit_runtime
