// Bundles of the corpus's manifests, whose graphs are empty files: an engine double runs them.
#pragma once

#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "../tests/npz.hpp"
#include "npy.hpp"
#include "reference.hpp"
#include "sha256.hpp"

namespace fuzzed {

namespace dit = dit_runtime;
using Json = nlohmann::json;
using Arrays = std::map<std::string, dit::NpyArray>;

template <typename T>
dit::NpyArray array_of(const dit::Shape& shape, T value) {
    const std::vector<T> values(dit::count(shape), value);
    const char kind = std::is_floating_point_v<T> ? 'f' : std::is_signed_v<T> ? 'i' : 'u';
    dit::NpyArray array{shape, {kind, static_cast<char>('0' + sizeof(T))}, {}};
    array.bytes.resize(values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(array.bytes.data(), values.data(), array.bytes.size());
    return array;
}

inline std::string npz(const Arrays& arrays) {
    std::vector<std::pair<std::string, std::string>> files;
    for (const auto& [name, array] : arrays)
        files.emplace_back(name + ".npy", dit::npy_bytes((array.kind[1] == '1' ? "|" : "<") + array.kind, array.shape,
                                                         array.bytes.data(), array.bytes.size()));
    return npz_of(files);
}

// A bundle in a folder of its own, which goes when the process ends.
class Bundle {
  public:
    Bundle(Json table, const dit::Path& where) : folder(where), table_(std::move(table)) {
        std::filesystem::create_directories(folder);
        for (auto& entry : table_["files"].items()) write(entry.key(), "");
        write_manifest();
        manifest = dit::read(folder);
    }
    ~Bundle() {
        std::error_code ignored;
        std::filesystem::remove_all(folder, ignored);
    }
    Bundle(const Bundle&) = delete;
    Bundle& operator=(const Bundle&) = delete;

    // A file of the bundle, as the manifest then says.
    void write(const std::string& name, const std::string& content) {
        std::ofstream(folder / name, std::ios::binary) << content;
        dit::Sha256 sum;
        sum.update(reinterpret_cast<const unsigned char*>(content.data()), content.size());
        table_["files"][name] = {{"size", content.size()}, {"sha256", sum.hex()}};
    }
    void write_manifest() { std::ofstream(folder / dit::MANIFEST) << table_.dump(); }

    // A reference of the right names, kinds and shapes.
    Arrays reference() const {
        const std::int64_t steps = 2, batch = 2;
        const dit::Shape sample = dit::with_rows(batch, manifest.state().shape);
        const dit::Shape run = dit::with_rows(steps, sample), image = manifest.image_shape();
        const bool variance = dit::find(manifest.step().gives, "variance") != nullptr;
        Arrays arrays = {{"betas", array_of<double>({manifest.process.train_steps}, 0.01)},
                         {"timesteps", array_of<double>({steps}, 0.5)},
                         {"seeds", array_of<std::int64_t>({batch}, 1)},
                         {"guidance", array_of<float>({batch}, 2)},
                         {"latents", array_of<float>(dit::with_rows(steps + 1, sample), 0.5)},
                         {"prediction", array_of<float>(run, 0.5)},
                         {"conditional", array_of<float>(run, 0.5)},
                         {"null", array_of<float>(manifest.mixes_guidance() ? run : dit::Shape{0}, 0.5)},
                         {"variance", array_of<float>(variance ? run : dit::Shape{0}, 0.5)},
                         {"images", array_of<std::uint8_t>(
                                        image.empty() ? dit::Shape{0} : dit::Shape{batch, image[1], image[2], 3}, 7)}};
        dit::Reference rows;
        rows.seeds.resize(batch);
        rows.condition.rows = batch;
        rows.negative.rows = manifest.mixes_guidance() ? 1 : 0;
        for (const dit::Port& port : manifest.conditions())
            for (dit::Rows* some : {&rows.condition, &rows.negative}) {
                if (!some->rows) continue;
                const dit::Shape shape = dit::with_rows(some->rows, port.shape);
                arrays[(some == &rows.condition ? "condition." : "null.") + port.name] =
                    port.dtype == "int64" ? array_of<std::int64_t>(shape, 1) : array_of<float>(shape, 1);
            }
        const dit::Port* const first = manifest.conditions().empty() ? nullptr : &manifest.ports.back();
        const bool label = manifest.conditions().size() == 1 && first->dtype == "int64" && first->shape.empty();
        const auto prints = label ? static_cast<std::size_t>(first->size)
                                  : batch + (manifest.conditions().empty() ? 1 : rows.negative.rows);
        arrays["fingerprint"] =
            array_of<float>(dit::with_rows(prints, {static_cast<std::int64_t>(dit::FINGERPRINTS)}), 0.5);
        return arrays;
    }

    const dit::Path folder;
    dit::Manifest manifest;

  private:
    Json table_;
};

// One of each manifest of the corpus that is sound.
inline std::vector<std::unique_ptr<Bundle>>& bundles() {
    static auto all = [] {
        std::vector<std::unique_ptr<Bundle>> made;
        std::vector<dit::Path> files;
        for (const auto& entry : std::filesystem::directory_iterator(FUZZ_CORPUS))
            if (entry.path().extension() == ".json") files.push_back(entry.path());
        std::sort(files.begin(), files.end());
        const std::string own = "dit-fuzz-" + std::to_string(getpid()) + "-";
        for (const dit::Path& file : files) {
            Json table = Json::parse(std::ifstream(file), nullptr, false);
            try {
                if (table.is_object())
                    made.push_back(std::make_unique<Bundle>(
                        std::move(table), std::filesystem::temp_directory_path() / (own + file.stem().string())));
            } catch (const std::exception&) {  // a manifest that is refused
            }
        }
        return made;
    }();
    return all;
}

}  // namespace fuzzed
