// Mirrors dit_runtime/bundle/parsing.py.
#include "parsing.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "checks.hpp"
#include "facts.hpp"

namespace dit_runtime {
namespace {

using json::Json;
using json::refuse;

const std::int64_t MOST = limit("size");     // of classes and rows
const std::int64_t ROW_MOST = limit("row");  // numbers a row: 257 frames of 704 x 1216 pixels have 660 million
const std::int64_t PORT_MOST = limit("port_bytes");
const std::size_t RANK_MOST = static_cast<std::size_t>(limit("rank"));
const std::vector<std::string> ROLES = {"state", "time", "condition"};
const std::vector<std::string> RUNS = {PROMPT, "condition", "time", "time+condition", START, "step", "update", "end"};
const std::vector<std::string> DTYPES = {"float32", "int64"};

// A list or table with no more entries than the limit of this name.
const Json& counted(const Json& value, const char* name, const std::string& where) {
    const auto most = static_cast<std::size_t>(limit(name));
    if (value.size() > most) refuse(where, text(value.size(), " entries"), text("at most ", most));
    return value;
}

const Json& list(const Json& table, const char* key, const std::string& where) {
    return counted(json::list(json::need(table, key), where), key, where);
}

std::string name_of(const Json& table, const std::string& where) {
    const std::string name = json::string(json::need(table, "name"), where + ": name");
    if (name.empty()) refuse(where + ": name", name, "a name");
    return name;
}

std::string choice(const Json& table, const std::string& key, const std::string& where,
                   const std::vector<std::string>& known) {
    const std::string word = json::string(json::need(table, key), where + ": " + key);
    if (!contains(known, word)) refuse(where + ": " + key, word, "one of " + join(known));
    return word;
}

void require_row(const std::string& where, const Shape& row) {
    std::int64_t numbers = 1;
    for (const std::int64_t size : row) numbers = std::min(numbers * size, ROW_MOST + 1);
    if (numbers > ROW_MOST || row.size() > RANK_MOST)
        refuse(where, text(shown(row), " a row"), text("at most ", ROW_MOST, " numbers in ", RANK_MOST, " dimensions"));
}

Port parse_port(const Json& table) {
    json::known_keys(table, "a port", {"name", "role", "dtype", "shape", "size", "masks", "picture"});
    Port port;
    port.name = name_of(table, "a port");
    const std::string where = "port " + port.name;
    port.role = choice(table, "role", where, ROLES);
    port.dtype = choice(table, "dtype", where, DTYPES);
    for (const Json& size : json::list(json::need(table, "shape"), where + ": shape"))
        port.shape.push_back(json::integer(size, where + ": shape", 1, MOST));
    require_row(where, port.shape);
    const std::size_t bytes = count(port.shape) * (port.dtype == "int64" ? sizeof(std::int64_t) : sizeof(float));
    if (bytes > static_cast<std::size_t>(PORT_MOST))
        refuse(where, text(shown(port.shape), " a row"), text("at most ", PORT_MOST, " bytes"));
    if (table.contains("size")) port.size = json::integer(table["size"], where + ": size", 0, MOST);
    if (table.contains("masks")) port.masks = json::string(table["masks"], where + ": masks");
    if (table.contains("picture")) port.picture = json::boolean(table["picture"], where + ": picture");
    if (port.dtype == "int64" && port.size < 1) refuse(where + ": size", port.size, "1 or more values");
    if (port.dtype != "int64" && port.size) refuse(where + ": size", port.size, "0, for it is float32");
    return port;
}

std::vector<TensorSpec> parse_tensors(const Json& table, const std::string& key, const std::string& stage) {
    std::vector<TensorSpec> specs;
    const std::string where = text("stage ", stage, ": ", key);
    for (const Json& tensor : list(table, key.c_str(), where)) {
        json::known_keys(tensor, where, {"name", "dtype", "shape"});
        TensorSpec spec{name_of(tensor, where), choice(tensor, "dtype", where, DTYPES), {}};
        for (const Json& size : json::list(json::need(tensor, "shape"), where + ": shape")) {
            if (size.is_string() && !size.get<std::string>().empty())
                spec.shape.emplace_back(size.get<std::string>());
            else
                spec.shape.emplace_back(json::integer(size, text(where, ": ", spec.name, "'s shape"), 1, MOST));
        }
        require_row(where + ": " + spec.name, spec.row());
        specs.push_back(std::move(spec));
    }
    return specs;
}

Stage parse_stage(const Json& table) {
    json::known_keys(
        table, "a stage",
        {"name", "runs", "reads", "gives", "onnx", "max_batch", "precision", "backend", "engines", "shared"});
    Stage stage;
    stage.name = name_of(table, "a stage");
    const std::string where = "stage " + stage.name;
    stage.runs = choice(table, "runs", where, RUNS);
    stage.reads = parse_tensors(table, "reads", stage.name);
    stage.gives = parse_tensors(table, "gives", stage.name);
    stage.onnx = json::string(json::need(table, "onnx"), where + ": onnx");
    if (table.contains("engines"))
        for (const auto& entry :
             counted(json::table(table["engines"], where + ": engines"), "engines", where).items()) {
            for (const Json& name : counted(json::list(entry.value(), where + ": engines"), "shared", where))
                stage.engines[entry.key()].push_back(json::string(name, where + ": a file of engines"));
            if (entry.value().empty()) refuse(where + ": engines of " + entry.key(), entry.value(), "one file or more");
        }
    if (table.contains("shared"))
        for (const Json& name : list(table, "shared", where + ": shared"))
            stage.shared.push_back(json::string(name, where + ": a shared file"));
    if (table.contains("max_batch"))
        stage.max_batch = json::integer(table["max_batch"], where + ": max_batch", 1, MOST);
    if (table.contains("precision")) stage.precision = json::string(table["precision"], where + ": precision");
    if (table.contains("backend")) stage.backend = json::string(table["backend"], where + ": backend");
    return stage;
}

void require_template(const std::string& where, const std::string& words) {
    const std::size_t place = words.find("{}");
    if (place == std::string::npos || words.find("{}", place + 2) != std::string::npos)
        refuse(where, words, "text with {} in one place");
}

Prompt parse_prompt(const Json& table) {
    json::known_keys(table, "a prompt",
                     {"ids", "tokens", "size", "tokenizer", "mask", "template", "negative", "lowercase"});
    const auto word = [&](const char* key, const std::string& otherwise) {
        return table.contains(key) ? json::string(table[key], text("a prompt: ", key)) : otherwise;
    };
    Prompt prompt;
    prompt.ids = json::string(json::need(table, "ids"), "a prompt: ids");
    const std::string where = "prompt " + prompt.ids;
    if (prompt.ids.empty()) refuse("a prompt: ids", prompt.ids, "a name");
    prompt.tokens = json::integer(json::need(table, "tokens"), where + ": tokens", 1, MOST);
    prompt.size = json::integer(json::need(table, "size"), where + ": size", 1, MOST);
    prompt.tokenizer = json::string(json::need(table, "tokenizer"), where + ": tokenizer");
    prompt.mask = word("mask", prompt.mask);
    prompt.prompt_template = word("template", prompt.prompt_template);
    prompt.negative_template = word("negative", prompt.negative_template);
    require_template(where + ": template", prompt.prompt_template);
    if (!prompt.negative_template.empty()) require_template(where + ": negative", prompt.negative_template);
    if (table.contains("lowercase")) prompt.lowercase = json::boolean(table["lowercase"], where + ": lowercase");
    return prompt;
}

Guidance parse_guidance(const Json& table) {
    json::known_keys(table, "guidance", {"channels", "unguided_up_to_one", "default", "port"});
    Guidance guidance;
    guidance.weight = default_guidance();
    guidance.channels = json::integer(json::need(table, "channels"), "guidance: channels", 0, MOST);
    if (table.contains("unguided_up_to_one"))
        guidance.unguided_up_to_one = json::boolean(table["unguided_up_to_one"], "guidance: unguided_up_to_one");
    if (table.contains("default")) guidance.weight = json::number(table["default"], "guidance: default");
    if (table.contains("port")) guidance.port = json::string(table["port"], "guidance: port");
    return guidance;
}

// A number that fits a float.
double float_number(const Json& value, const std::string& where) {
    const double number = json::number(value, where);
    if (std::abs(number) > double{std::numeric_limits<float>::max()}) refuse(where, value, "a number of float32");
    return number;
}

std::pair<double, double> parse_interval(const Json& value, const std::string& where) {
    std::vector<double> ends;
    for (const Json& end : json::list(value, where)) ends.push_back(json::number(end, where));
    if (ends.size() != 2 || ends[0] < 0 || ends[0] > ends[1] || ends[1] > 1)
        refuse(where, value, "two numbers from 0 to 1, the lower one first");
    return {ends[0], ends[1]};
}

Preset parse_preset(const Json& table, const std::string& name, const Process& process) {
    if (name.empty()) refuse("presets", name, "a name");
    const std::string where = "preset " + name;
    std::vector<std::string> known = fact_names("preset_fields");
    known.push_back("measured");
    json::known_keys(table, where, known);
    const auto place = [&](const char* key) { return where + ": " + key; };
    const auto word = [&](const char* key) {
        const std::string text = table.contains(key) ? json::string(table[key], place(key)) : std::string();
        if (table.contains(key) && text.empty()) refuse(place(key), table[key], "a text");
        return text;
    };
    Preset preset;
    if (table.contains("steps")) preset.steps = json::integer(table["steps"], place("steps"), 1, process.train_steps);
    if (table.contains("solver")) preset.solver = choice(table, "solver", where, solvers_of(process.kind()));
    if (table.contains("cache")) preset.cache = choice(table, "cache", where, fact_names("caches"));
    preset.spacing = word("spacing");
    preset.guidance_policy = word("guidance_policy");
    if (table.contains("eta")) preset.eta = float_number(table["eta"], place("eta"));
    if (table.contains("guidance")) preset.guidance = float_number(table["guidance"], place("guidance"));
    if (table.contains("guidance_interval"))
        preset.guidance_interval = parse_interval(table["guidance_interval"], place("guidance_interval"));
    const std::int64_t most = limit("steps");
    for (const char* key : {"cache_interval", "max_order", "disable_cache_before_step", "disable_cache_after_step"})
        if (table.contains(key))
            preset.cache_settings[key] = static_cast<double>(json::integer(table[key], place(key), -most, most));
    if (table.contains("cache_threshold"))
        preset.cache_settings["cache_threshold"] = float_number(table["cache_threshold"], place("cache_threshold"));
    if (table.contains("measured")) json::table(table["measured"], place("measured"));
    return preset;
}

Built parse_built(const Json& table) {
    Built built;
    if (json::table(table, "an engine").contains("version")) built.version = json::string(table["version"], "version");
    if (table.contains("cuda")) built.cuda = json::integer(table["cuda"], "cuda", 0, MOST);
    if (table.contains("compute_capabilities"))
        for (const Json& capability : json::list(table["compute_capabilities"], "compute_capabilities"))
            built.compute_capabilities.push_back(json::string(capability, "a compute capability"));
    if (table.contains("tuning")) {
        const Json& tuning = json::table(table["tuning"], "tuning");
        built.version_compatible = tuning.contains("version_compatible");
        built.weight_streaming = tuning.contains("weight_streaming");
    }
    return built;
}

void parse_engines(const Json& table, Manifest& manifest) {
    if (!table.contains("built_with") || !table["built_with"].contains("engines")) return;
    for (const auto& backend : json::table(table["built_with"]["engines"], "engines").items())
        for (const auto& engine : json::table(backend.value(), backend.key()).items())
            for (Stage& stage : manifest.stages)
                if (stage.name == engine.key()) stage.built[backend.key()] = parse_built(engine.value());
}

// What each size has a value of its own for; the first five are needed.
const std::vector<const char*> OF_A_SIZE = {"size",   "model",      "ports",  "process",        "stages",
                                            "suffix", "built_with", "parity", "batch_invariant"};

// The manifest of one size; a table's other sizes are left out.
Manifest parse_one(const Json& table) {
    for (const char* key : {"source", "built_with", "parity"})
        if (table.contains(key)) json::table(table[key], key);
    Manifest manifest;
    const Json& model = json::table(json::need(table, "model"), "model");
    if (model.contains("name") && model["name"].is_string()) manifest.model_name = model["name"].get<std::string>();
    for (const Json& port : list(table, "ports", "ports")) manifest.ports.push_back(parse_port(port));
    for (const auto& entry : json::table(json::need(table, "null"), "null").items()) {
        const Port* const port = manifest.port(entry.key());
        if (port && port->dtype == "int64") json::integer(entry.value(), "null: " + entry.key(), 0, MOST);
        manifest.null[entry.key()] = json::number(entry.value(), "null: " + entry.key());
    }
    for (const Json& name : list(table, "labels", "labels")) manifest.labels.push_back(json::string(name, "a label"));
    manifest.guidance = parse_guidance(json::need(table, "guidance"));
    manifest.process = process_from_json(json::need(table, "process"));
    for (const Json& stage : list(table, "stages", "stages")) manifest.stages.push_back(parse_stage(stage));
    if (table.contains("prompts"))
        for (const Json& prompt : list(table, "prompts", "prompts")) manifest.prompts.push_back(parse_prompt(prompt));
    std::int64_t bytes = 0;
    for (const auto& entry : counted(json::table(json::need(table, "files"), "files"), "files", "files").items()) {
        json::known_keys(entry.value(), "files: " + entry.key(), {"size", "sha256"});
        const std::string where = "size of " + entry.key();
        const std::int64_t most = limit("bundle_bytes");
        const std::int64_t size = json::integer(json::need(entry.value(), "size"), where, 0, most);
        if ((bytes += size) > most) refuse("files", text(bytes, " bytes in all"), text("at most ", most));
        const std::string sum = json::string(json::need(entry.value(), "sha256"), "sha256 of " + entry.key());
        manifest.files[entry.key()] = {static_cast<std::uintmax_t>(size), sum};
    }
    if (table.contains("batch_invariant"))
        manifest.batch_invariant = json::boolean(table["batch_invariant"], "batch_invariant");
    if (table.contains("size")) manifest.size = json::string(table["size"], "size");
    if (table.contains("suffix")) manifest.suffix = json::string(table["suffix"], "suffix");
    if (table.contains("presets"))
        for (const auto& entry : counted(json::table(table["presets"], "presets"), "presets", "presets").items())
            manifest.presets[entry.key()] = parse_preset(entry.value(), entry.key(), manifest.process);
    check(manifest);
    parse_engines(table, manifest);
    auto& stages = manifest.stages;
    const auto update =
        std::find_if(stages.begin(), stages.end(), [](const Stage& stage) { return stage.runs == "update"; });
    if (update != stages.end()) {
        manifest.update = std::move(*update);
        stages.erase(update);
    }
    return manifest;
}

// The manifest at another size: its keys take the place of the table's.
Manifest parse_size(Json table, const Json& size) {
    json::known_keys(size, "a size", {OF_A_SIZE.begin(), OF_A_SIZE.end()});
    for (std::size_t index = 0; index < OF_A_SIZE.size(); ++index) {
        const char* const key = OF_A_SIZE[index];
        table.erase(key);
        if (index < 5) json::need(size, key);
        if (size.contains(key)) table[key] = size[key];
    }
    return parse_one(table);
}

}  // namespace

Manifest parse_table(const Json& table) {
    json::known_keys(table, "the manifest",
                     {"format", "model", "ports", "null", "labels", "guidance", "process", "stages", "prompts", "files",
                      "source", "built_with", "parity", "batch_invariant", "presets", "size", "suffix", "sizes"});
    Manifest manifest = parse_one(table);
    if (table.contains("sizes"))
        for (const Json& size : list(table, "sizes", "sizes")) manifest.sizes.push_back(parse_size(table, size));
    check_sizes(manifest);
    return manifest;
}

}  // namespace dit_runtime
