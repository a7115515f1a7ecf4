// The bundle's contract: manifest.json, what it may say, and the checks before anything it names is opened.
// Mirrors dit_runtime/bundle/records.py and manifest.py.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "schedule.hpp"

namespace dit_runtime {

using Path = std::filesystem::path;
using Shape = std::vector<std::int64_t>;

inline constexpr std::uint64_t FORMAT = 2;
inline const char* const MANIFEST = "manifest.json";
inline const char* const ENGINE = ".engine";  // what a file that a backend has compiled ends in
inline const char* const GRAPH = ".onnx";

inline const std::vector<std::string> BEFORE_LOOP = {"condition", "time", "time+condition"};  // what such stages run
inline const char* const LABELS = "labels";      // the port that a user may fill with class names
inline const char* const GUIDANCE = "guidance";  // the input of the step stage that mixes guidance
inline const char* const PROMPT = "prompt";      // what the stage runs that turns token ids into condition ports
inline const char* const START = "start";        // what the stage runs that makes latents of pictures
inline const char *const MEAN = "mean", *const LOGVAR = "logvar";  // its outputs
// What other inputs and outputs of the stages are called, so that no port may be.
inline const std::vector<std::string> RESERVED = {GUIDANCE, "prediction", "variance", "previous", "coefficients",
                                                  "kept",   "next",       "images",   MEAN,       LOGVAR};

// One input of the network.
struct Port {
    std::string name;
    std::string role;        // "state", "time" or "condition"
    std::string dtype;       // "float32" or "int64"
    Shape shape;             // of one row
    std::int64_t size = 0;   // int64 only: values are 0 … size - 1
    std::string masks = {};  // the condition port whose tokens (axis 0 of a row) this port marks with 1 or 0
    bool picture = false;    // a condition of a picture's latents, in the state's shape
};

// One tokenizer's view of a prompt: inputs of the stage that runs "prompt". Its template is for those who tokenize.
struct Prompt {
    std::string ids;  // input [rows, tokens] int64
    std::int64_t tokens = 0;
    std::int64_t size = 0;  // ids are 0 … size - 1
    std::string tokenizer;  // a file of the bundle: a tokenizer.json that truncates and pads to `tokens`
    std::string mask = {};  // input [rows, tokens] int64: 1 for each token of the prompt; empty: none is read
    std::string prompt_template = "{}";  // around the prompt
    std::string negative_template = {};  // that of negative prompts; empty: the same
    bool lowercase = false;              // strip and lower the user's words before they go into the template
};

// Values for fields of a request that names the preset and leaves them at their defaults.
struct Preset {
    std::int64_t steps = 0;                 // 0: not stated
    std::string solver = {}, spacing = {};  // empty: not stated
    double eta = 0;
    std::optional<double> guidance = {};
    std::optional<std::pair<double, double>> guidance_interval = {};
    std::string guidance_policy = {}, cache = {};
    std::map<std::string, double> cache_settings = {};
};

// How guidance reaches the network.
struct Guidance {
    std::int64_t channels = 0;       // the leading channels that guidance moves
    bool unguided_up_to_one = true;  // weights below 1 count as 1
    double weight = 0;               // where a request names none
    std::string port = {};           // the condition port that takes the weight; empty: two groups are mixed
};

// One input or output of a stage; a name in the shape is a free dimension.
struct TensorSpec {
    std::string name;
    std::string dtype;
    std::vector<std::variant<std::int64_t, std::string>> shape;

    Shape row() const;                           // the sizes behind the free dimensions
    bool starts(const std::string& free) const;  // whether the first dimension has this name
};

// The backend version, driver and GPUs that an engine needs.
struct Built {
    std::string version;                            // of the backend
    std::int64_t cuda = 0;                          // that the driver must have
    std::vector<std::string> compute_capabilities;  // "8.9", or "8.0+" and later; none: any
    bool version_compatible = false;                // opens in later versions too
    bool weight_streaming = false;                  // its weights may be larger than the GPU's memory
};

// One graph of the bundle: when it runs, its portable ONNX form, and the files that backends open instead.
struct Stage {
    std::string name;
    std::string runs;  // "prompt", "condition", "time", "time+condition", "start", "step", "update" or "end"
    std::vector<TensorSpec> reads, gives;
    std::string onnx;
    std::int64_t max_batch = 8;  // rows that it takes at a time
    std::string precision = "fp32";
    std::string backend = "onnxruntime";
    std::map<std::string, std::vector<std::string>> engines;  // by backend
    std::vector<std::string> shared;     // files of weights that the portable form has in common with other sizes'
    std::map<std::string, Built> built;  // by backend, where the engines are for one kind of GPU

    std::vector<std::string> onnx_files() const {
        std::vector<std::string> files = {onnx, onnx + ".data"};
        files.insert(files.end(), shared.begin(), shared.end());
        return files;
    }
    std::vector<std::string> files(const std::string& name) const {
        const auto own = engines.find(name);
        return own == engines.end() ? onnx_files() : own->second;
    }
    std::vector<std::string> files() const { return files(backend); }
    bool before_loop() const;
};

// A size's one name: 512 for "512x512".
std::string size_name(const std::string& size);

// The tensor of this name; NULL where there is none.
const TensorSpec* find(const std::vector<TensorSpec>& specs, const std::string& name);

struct File {
    std::uintmax_t size;
    std::string sha256;
};

struct Manifest {
    std::string model_name;  // for people
    std::vector<Port> ports;
    std::map<std::string, double> null;  // what guidance leads away from: a constant by condition port
    std::vector<std::string> labels;     // class names of the port "labels"; empty where they are unknown
    Guidance guidance;
    Process process;
    std::vector<Stage> stages;    // in the order of running, but for "update"
    std::optional<Stage> update;  // for runs whose state stays on a device
    std::vector<Prompt> prompts;  // what the stage reads that runs "prompt"
    std::map<std::string, File> files;
    bool batch_invariant = false;  // verification saw that a sample has the same bits in each batch
    std::string size;    // the name of the size that all of this is of; empty: the bundle has one, without a name
    std::string suffix;  // ends the names of the size's own files, before their extension: reference-512x768.npz
    std::vector<Manifest> sizes;  // the manifest at the other sizes
    std::map<std::string, Preset> presets;

    // The manifest of a size of the bundle, which then is the one that requests without a size draw; empty: this one.
    Manifest at(const std::string& name) const;
    std::string own(const std::string& file) const;       // the name that a file of each size has at this size
    const Preset& preset(const std::string& name) const;  // refuses one that is not there
    const Port& state() const;                            // the port that the loop changes
    const Port& time() const;
    std::vector<Port> conditions() const;             // all condition ports, masks too
    const Port* port(const std::string& name) const;  // NULL where there is none
    // The number of classes that a label may name; 0 if the network takes no labels.
    std::int64_t classes() const;
    // The condition ports, masks apart, that a guided request must bring a negative for.
    std::vector<std::string> without_null() const;
    // True if the step stage takes guidance weights; else guidance changes nothing.
    bool mixes_guidance() const;
    const Stage* prompt() const;  // NULL where no stage runs "prompt"
    const Stage& step() const;
    const Stage* end() const;     // NULL without a decoder
    const Stage* start() const;   // NULL without an encoder of pictures
    const Port* picture() const;  // the condition port that takes a picture's latents; NULL where there is none
    Shape picture_shape() const;  // (3, H, W) of the pictures that a run may start from; refuses to without an encoder
    Shape image_shape() const;    // (3, H, W), of videos (3, F, H, W); empty without a decoder
    std::int64_t frames() const;  // of a video; 0 where pictures are drawn, and without a decoder
};

// Parses and checks the manifest, and that each file it names is there in its size; opens none of them. A manifest of
// another sum than `sha256`, or that the owner of the public key did not sign, is not parsed; empty: any is.
Manifest read(const Path& folder, const std::string& sha256 = {},
              const std::optional<std::vector<unsigned char>>& public_key = std::nullopt);

// The same for the text alone: what it says, and no file is looked for. `where` begins each message.
Manifest parse(const std::string& content, const std::string& where);

// The parts of a file's name in the bundle; nothing may lead out of the folder.
std::vector<std::string> parts_inside(const Path& folder, const std::string& name);

// The file `name` of the bundle; nothing may lead out of the folder.
Path inside(const Path& folder, const std::string& name);

std::size_t count(const Shape& shape);
Shape with_rows(std::size_t rows, const Shape& row);
std::string shown(const Shape& shape);

}  // namespace dit_runtime
