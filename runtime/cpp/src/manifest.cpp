#include "manifest.hpp"

#include <algorithm>
#include <fstream>
#include <numeric>

#include "diffusion.hpp"
#include "sha256.hpp"

namespace dit_runtime {
namespace {

using json::Json;

const std::vector<std::string> GRAPHS = {"conditioner", "context", "denoiser", "update", "decoder"};

TensorSpec parse_tensor(const Json& table) {
    json::known_keys(table, "a tensor", {"name", "dtype", "shape"});
    TensorSpec spec{
        json::string(json::need(table, "name"), "name"), json::string(json::need(table, "dtype"), "dtype"), {}};
    if (!contains({"float32", "int64"}, spec.dtype))
        throw std::invalid_argument(spec.name + " has dtype " + spec.dtype + "; known: float32, int64");
    for (const Json& size : json::list(json::need(table, "shape"), "shape")) {
        if (size.is_string())
            spec.shape.emplace_back(size.get<std::string>());
        else
            spec.shape.emplace_back(json::integer(size, spec.name + "'s shape", 1, MOST));
    }
    return spec;
}

std::vector<TensorSpec> parse_tensors(const Json& table, const std::string& key) {
    std::vector<TensorSpec> specs;
    for (const Json& tensor : json::list(json::need(table, key), key)) specs.push_back(parse_tensor(tensor));
    return specs;
}

Graph parse_graph(const Json& table) {
    json::known_keys(table, "a graph", {"onnx", "inputs", "outputs", "max_batch", "precision", "backend", "engines"});
    Graph graph;
    graph.onnx = json::string(json::need(table, "onnx"), "onnx");
    graph.inputs = parse_tensors(table, "inputs");
    graph.outputs = parse_tensors(table, "outputs");
    for (const auto& entry : json::table(json::need(table, "engines"), "engines").items()) {
        for (const Json& name : json::list(entry.value(), "engines"))
            graph.engines[entry.key()].push_back(json::string(name, "a file of engines"));
        if (entry.value().empty()) throw std::invalid_argument("an engine without files: " + entry.key());
    }
    if (table.contains("max_batch")) graph.max_batch = json::integer(table["max_batch"], "max_batch", 1, MOST);
    if (table.contains("precision")) graph.precision = json::string(table["precision"], "precision");
    if (table.contains("backend")) graph.backend = json::string(table["backend"], "backend");
    return graph;
}

// What stands behind the free first dimension, as numbers.
Shape fixed(const std::string& name, const std::vector<TensorSpec>& specs) {
    Shape sizes;
    std::int64_t product = 1;
    if (!specs.empty() && specs[0].shape.size() > 1)
        for (auto size = specs[0].shape.begin() + 1; size != specs[0].shape.end(); ++size) {
            if (!std::holds_alternative<std::int64_t>(*size)) {
                sizes.clear();
                break;
            }
            sizes.push_back(std::get<std::int64_t>(*size));
            product = std::min(product * sizes.back(), ROW_MOST + 1);
        }
    if (sizes.empty() || product > ROW_MOST)
        throw std::invalid_argument(
            text(name, " has no shape a row of numbers, or one of more than ", ROW_MOST, " numbers"));
    return sizes;
}

Built parse_built(const Json& table) {
    Built built;
    if (json::table(table, "an engine").contains("version")) built.version = json::string(table["version"], "version");
    if (table.contains("cuda")) built.cuda = json::integer(table["cuda"], "cuda", 0, MOST);
    if (table.contains("compute_capabilities"))
        for (const Json& one : json::list(table["compute_capabilities"], "compute_capabilities"))
            built.compute_capabilities.push_back(json::string(one, "a compute capability"));
    if (table.contains("tuning")) {
        const Json& tuning = json::table(table["tuning"], "tuning");
        built.version_compatible = tuning.contains("version_compatible");
        built.weight_streaming = tuning.contains("weight_streaming");
    }
    return built;
}

Manifest parse_table(const Json& table) {
    json::known_keys(table, "the manifest",
                     {"format", "model", "latent_shape", "latent_scale", "num_classes", "labels", "guided_channels",
                      "unguided_up_to_one", "diffusion", "graphs", "files", "source", "built_with", "parity"});
    for (const char* key : {"source", "built_with", "parity"})
        if (table.contains(key)) json::table(table[key], key);
    Manifest manifest;
    const Json& model = json::table(json::need(table, "model"), "model");
    if (model.contains("name") && model["name"].is_string()) manifest.model_name = model["name"].get<std::string>();
    for (const Json& size : json::list(json::need(table, "latent_shape"), "latent_shape"))
        manifest.latent_shape.push_back(json::integer(size, "latent_shape", 1, MOST));
    if (!json::need(table, "latent_scale").is_null()) json::number(table["latent_scale"], "latent_scale");
    manifest.num_classes = json::integer(json::need(table, "num_classes"), "num_classes", 1, MOST);
    for (const Json& name : json::list(json::need(table, "labels"), "labels"))
        manifest.labels.push_back(json::string(name, "a label"));
    manifest.guided_channels = json::integer(json::need(table, "guided_channels"), "guided_channels", 0, MOST);
    manifest.unguided_up_to_one = json::boolean(json::need(table, "unguided_up_to_one"), "unguided_up_to_one");
    manifest.diffusion = diffusion_from_json(json::need(table, "diffusion"));

    std::vector<std::string> names;
    for (const auto& entry : json::table(json::need(table, "graphs"), "graphs").items()) {
        names.push_back(entry.key());
        manifest.graphs[entry.key()] = parse_graph(entry.value());
    }
    const auto known = [](const std::string& name) { return contains(GRAPHS, name); };
    if (!contains(names, "conditioner") || !contains(names, "denoiser") ||
        !std::all_of(names.begin(), names.end(), known))
        throw std::invalid_argument("graphs " + join(names) + "; expected " + join(GRAPHS) +
                                    " (conditioner and denoiser always)");
    for (const auto& entry : json::table(json::need(table, "files"), "files").items()) {
        const std::string where = "size of " + entry.key();
        const std::int64_t size = json::integer(json::need(entry.value(), "size"), where, 0, INT64_MAX);
        const std::string sum = json::string(json::need(entry.value(), "sha256"), "sha256 of " + entry.key());
        manifest.files[entry.key()] = {static_cast<std::uintmax_t>(size), sum};
    }
    for (const auto& [graph_name, graph] : manifest.graphs) {
        std::vector<std::string> named = graph.files();
        for (const auto& own : graph.engines) named.insert(named.end(), own.second.begin(), own.second.end());
        for (const auto& name : named)
            if (!manifest.files.count(name)) throw std::invalid_argument(name + " has no size and sha256 under files");
    }
    if (table.contains("built_with") && table["built_with"].contains("engines"))
        for (const auto& backend : json::table(table["built_with"]["engines"], "engines").items())
            for (const auto& engine : json::table(backend.value(), backend.key()).items())
                if (manifest.graphs.count(engine.key()))
                    manifest.graphs[engine.key()].built[backend.key()] = parse_built(engine.value());
    manifest.graphs.erase("update");  // which is for engines on a device: here solvers step on the host
    if (!manifest.labels.empty() && manifest.labels.size() != static_cast<std::size_t>(manifest.num_classes))
        throw std::invalid_argument(text(manifest.labels.size(), " label names, expected ", manifest.num_classes));
    if (manifest.latent_shape.size() != 3)
        throw std::invalid_argument("latent_shape, expected [channels, height, width]");
    if (fixed("denoiser", manifest.graphs["denoiser"].inputs) != manifest.latent_shape)
        throw std::invalid_argument("latent_shape is not the denoiser's");
    if (manifest.conditioning_shape().size() != 2)
        throw std::invalid_argument("the conditioner does not give [vectors, channels] a row");
    if (manifest.graphs.count("context") &&
        (manifest.caption_shape().size() != 2 || manifest.context_shape().size() != 2))
        throw std::invalid_argument("context does not take [tokens, channels] a row and give [vectors, channels]");
    if (manifest.graphs.count("decoder") && (manifest.image_shape().size() != 3 || manifest.image_shape()[0] != 3))
        throw std::invalid_argument("the decoder's pictures are not [3, height, width] a row");
    return manifest;
}

}  // namespace

Shape Manifest::conditioning_shape() const { return fixed("conditioner", graphs.at("conditioner").outputs); }

Shape Manifest::context_shape() const { return fixed("context", graphs.at("context").outputs); }

Shape Manifest::caption_shape() const {
    return graphs.count("context") ? fixed("context", graphs.at("context").inputs) : Shape();
}

Shape Manifest::image_shape() const { return fixed("decoder", graphs.at("decoder").outputs); }

Manifest parse(const std::string& content, const std::string& where) {
    Json table;
    try {
        table = Json::parse(content);
    } catch (const Json::exception& error) {
        throw BundleError(where + ": not JSON: " + error.what());
    }
    if (!table.is_object() || !table.contains("format") || !table["format"].is_number_integer())
        throw BundleError(text(where, ": no format number; expected ", FORMAT));
    if (table["format"] != FORMAT) {
        const bool newer = table["format"].is_number_unsigned() && table["format"].get<std::uint64_t>() > FORMAT;
        throw BundleError(text(where, ": format ", table["format"].dump(), ", expected ", FORMAT, ": ",
                               newer ? "upgrade dit-export" : "rebuild it with `dit-export build`"));
    }
    try {
        return parse_table(table);
    } catch (const std::invalid_argument& error) {
        throw BundleError(where + ": malformed: " + error.what());
    }
}

Diffusion parse_diffusion(const std::string& content) { return diffusion_from_json(Json::parse(content)); }

Manifest read(const Path& folder) {
    const Path path = folder / MANIFEST;
    std::error_code failure;
    if (!std::filesystem::is_regular_file(path, failure) || std::filesystem::is_symlink(path, failure))
        throw BundleError(
            text(folder.string(), ": no ", MANIFEST, " here; expected a bundle, as `dit-export build` writes it"));
    const std::uintmax_t size = std::filesystem::file_size(path, failure);
    if (failure || size > MANIFEST_BYTES)
        throw BundleError(text(path.string(), ": cannot be read, or has more than ", MANIFEST_BYTES, " bytes"));
    std::string content(static_cast<std::size_t>(size), '\0');
    if (!std::ifstream(path, std::ios::binary).read(content.data(), static_cast<std::streamsize>(size)))
        throw BundleError(path.string() + ": cannot be read");
    Manifest manifest = parse(content, path.string());
    for (const auto& [name, file] : manifest.files) {
        const Path location = inside(folder, name);
        if (!std::filesystem::is_regular_file(location, failure))
            throw BundleError(text(folder.string(), ": ", name, " is missing; rebuild the bundle"));
        const std::uintmax_t found = std::filesystem::file_size(location, failure);
        if (failure || found != file.size)
            throw BundleError(
                text(folder.string(), ": ", name, " has ", found, " bytes, expected ", file.size, "; rebuild it"));
    }
    return manifest;
}

Path inside(const Path& folder, const std::string& name) {
    std::vector<std::string> parts;
    bool leaves = name.empty() || name[0] == '/' || name.find_first_of(std::string("\\:\0", 3)) != std::string::npos;
    for (const Path& part : Path(name))
        if (!part.empty() && part != ".") parts.push_back(part.string());
    if (leaves || parts.empty() || contains(parts, ".."))
        throw BundleError(text(folder.string(), ": file name '", name, "' leaves the bundle; refused"));
    Path path = folder;
    for (const auto& part : parts) {
        path /= part;
        std::error_code failure;
        if (std::filesystem::is_symlink(path, failure))
            throw BundleError(text(folder.string(), ": '", name, "' is a link; refused"));
    }
    return path;
}

void check_files(const Path& folder, const Manifest& manifest, const std::vector<std::string>& names) {
    for (const auto& name : names) {
        const auto file = manifest.files.find(name);
        if (file == manifest.files.end())
            throw BundleError(text(folder.string(), ": ", name, " is not in the manifest"));
        if (sha256(inside(folder, name)) != file->second.sha256)
            throw BundleError(text(folder.string(), ": ", name,
                                   " does not have the sha256 of its manifest; it is damaged: rebuild it"));
    }
}

}  // namespace dit_runtime
