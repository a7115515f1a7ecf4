// Mirrors dit_runtime/bundle/parsing.py.
#include "parsing.hpp"

#include <algorithm>

namespace dit_runtime {
namespace {

using json::Json;

// A tensor that stages may read: what it depends on, its dtype and a row's shape.
struct Source {
    std::string role, dtype;
    Shape row;
};
using Sources = std::map<std::string, Source>;
using FreeShape = std::vector<std::variant<std::int64_t, std::string>>;

template <typename Value>
[[noreturn]] void refuse(const std::string& where, const Value& value, const std::string& expected) {
    throw std::invalid_argument(text(where, ": got ", value, ", expected ", expected));
}

std::string shown(const std::string& dtype, const FreeShape& shape) {
    std::vector<std::string> sizes;
    for (const auto& size : shape)
        sizes.push_back(std::holds_alternative<std::string>(size) ? "'" + std::get<std::string>(size) + "'"
                                                                  : std::to_string(std::get<std::int64_t>(size)));
    return dtype + " [" + join(sizes) + "]";
}

FreeShape with_free(FreeShape free, const Shape& row) {
    free.insert(free.end(), row.begin(), row.end());
    return free;
}

std::string name_of(const Json& table, const std::string& where) {
    const std::string name = json::string(json::need(table, "name"), where + ": name");
    if (name.empty()) refuse(where + ": name", "''", "a name");
    return name;
}

std::string choice(const Json& table, const std::string& key, const std::string& where,
                   const std::vector<std::string>& known) {
    const std::string word = json::string(json::need(table, key), where + ": " + key);
    if (!contains(known, word)) refuse(where + ": " + key, "'" + word + "'", "one of " + join(known));
    return word;
}

void require_row(const std::string& where, const Shape& row) {
    std::int64_t numbers = 1;
    for (const std::int64_t size : row) numbers = std::min(numbers * size, ROW_MOST + 1);
    if (numbers > ROW_MOST || row.size() > RANK_MOST)
        refuse(where, text(dit_runtime::shown(row), " a row"),
               text("at most ", ROW_MOST, " numbers in ", RANK_MOST, " dimensions"));
}

Port parse_port(const Json& table) {
    json::known_keys(table, "a port", {"name", "role", "dtype", "shape", "size", "masks"});
    Port port;
    port.name = name_of(table, "a port");
    const std::string where = "port " + port.name;
    port.role = choice(table, "role", where, ROLES);
    port.dtype = choice(table, "dtype", where, DTYPES);
    for (const Json& size : json::list(json::need(table, "shape"), where + ": shape"))
        port.shape.push_back(json::integer(size, where + ": shape", 1, MOST));
    require_row(where, port.shape);
    if (table.contains("size")) port.size = json::integer(table["size"], where + ": size", 0, MOST);
    if (table.contains("masks")) port.masks = json::string(table["masks"], where + ": masks");
    if (port.dtype == "int64" && port.size < 1) refuse(where + ": size", port.size, "1 or more values");
    if (port.dtype != "int64" && port.size) refuse(where + ": size", port.size, "0, for it is float32");
    return port;
}

std::vector<TensorSpec> parse_tensors(const Json& table, const std::string& key, const std::string& stage) {
    std::vector<TensorSpec> specs;
    for (const Json& tensor : json::list(json::need(table, key), key)) {
        const std::string where = text("stage ", stage, ": ", key);
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
    json::known_keys(table, "a stage",
                     {"name", "runs", "reads", "gives", "onnx", "max_batch", "precision", "backend", "engines"});
    Stage stage;
    stage.name = name_of(table, "a stage");
    const std::string where = "stage " + stage.name;
    stage.runs = choice(table, "runs", where, RUNS);
    stage.reads = parse_tensors(table, "reads", stage.name);
    stage.gives = parse_tensors(table, "gives", stage.name);
    stage.onnx = json::string(json::need(table, "onnx"), where + ": onnx");
    if (table.contains("engines"))
        for (const auto& entry : json::table(table["engines"], where + ": engines").items()) {
            for (const Json& name : json::list(entry.value(), where + ": engines"))
                stage.engines[entry.key()].push_back(json::string(name, where + ": a file of engines"));
            if (entry.value().empty()) refuse(where + ": engines of " + entry.key(), "[]", "a list of files");
        }
    if (table.contains("max_batch"))
        stage.max_batch = json::integer(table["max_batch"], where + ": max_batch", 1, MOST);
    if (table.contains("precision")) stage.precision = json::string(table["precision"], where + ": precision");
    if (table.contains("backend")) stage.backend = json::string(table["backend"], where + ": backend");
    return stage;
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

void require_distinct(const std::string& what, std::vector<std::string> names) {
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end())
        throw std::invalid_argument(text(what, " '", *twice, "' is listed more than once, expected once"));
}

void check_ports(const Manifest& manifest) {
    for (const char* role : {"state", "time"}) {
        const auto ports = std::count_if(manifest.ports.begin(), manifest.ports.end(),
                                         [&](const Port& port) { return port.role == role; });
        if (ports != 1) refuse(text(role, " ports"), ports, "exactly one");
    }
    const Port &state = manifest.state(), &time = manifest.time();
    if (state.dtype != "float32" || state.shape.empty())
        refuse("port " + state.name, state.dtype + " " + dit_runtime::shown(state.shape), "float32 of rank 1 or more");
    if (time.dtype != "float32" || !time.shape.empty())
        refuse("port " + time.name, time.dtype + " " + dit_runtime::shown(time.shape), "float32 of rank 0");
    if (manifest.guided_channels < 1 || manifest.guided_channels > state.shape[0])
        refuse("guidance: channels", manifest.guided_channels, text("1 to ", state.shape[0]));
    std::vector<std::string> masked;
    for (const Port& port : manifest.ports) {
        if (port.masks.empty()) continue;
        const Port* const other = manifest.port(port.masks);
        if (port.role != "condition" || !other || other == &port || other->role != "condition" ||
            !other->masks.empty() || other->shape.empty())
            refuse(text("port ", port.name, ": masks"), "'" + port.masks + "'",
                   "a condition port that has tokens and is no mask");
        if (port.shape != Shape{other->shape[0]})
            refuse(text("port ", port.name, ": shape"), dit_runtime::shown(port.shape),
                   dit_runtime::shown({other->shape[0]}));
        masked.push_back(port.masks);
    }
    require_distinct("masked port", masked);
    if (!manifest.labels.empty() && static_cast<std::int64_t>(manifest.labels.size()) != manifest.classes())
        refuse("labels", text(manifest.labels.size(), " names"), std::to_string(manifest.classes()));
}

void check_null(const Manifest& manifest) {
    for (const auto& [name, value] : manifest.null) {
        const Port* const port = manifest.port(name);
        if (!port || port->role != "condition") refuse("null", name, "a condition port");
        if (port->dtype == "int64" && (value != std::floor(value) || value < 0 || value >= double(port->size)))
            refuse("null: " + name, value, text("0 to ", port->size - 1));
    }
    if (manifest.classes() && manifest.null.count(LABELS)) {
        const std::int64_t last = manifest.port(LABELS)->size - 1;
        if (manifest.null.at(LABELS) != double(last))
            refuse(text("null: ", LABELS), manifest.null.at(LABELS), text(last, ", after all classes"));
    }
}

void check_shape(const Stage& stage, const TensorSpec& spec, const FreeShape& shape,
                 const std::string& dtype = "float32") {
    if (spec.dtype != dtype || spec.shape != shape)
        refuse(text("stage ", stage.name, ": ", spec.name, " is"), shown(spec.dtype, spec.shape), shown(dtype, shape));
}

// Refuses an input that no port and no earlier stage gives in this shape and type, or that the stage may not use.
void check_source(const Stage& stage, const TensorSpec& spec, const FreeShape& free, const Sources& sources,
                  const std::vector<std::string>& roles) {
    const auto source = sources.find(spec.name);
    if (source == sources.end() || !contains(roles, source->second.role)) {
        std::vector<std::string> readable;
        for (const auto& [name, other] : sources)
            if (contains(roles, other.role)) readable.push_back(name);
        refuse(text("stage ", stage.name, " (runs '", stage.runs, "') reads"), spec.name,
               readable.empty() ? "nothing" : "one of " + join(readable));
    }
    check_shape(stage, spec, with_free(free, source->second.row), source->second.dtype);
}

void check_before_loop(const Stage& stage, Sources& sources) {
    // What a stage before the loop may depend on.
    static const std::map<std::string, std::vector<std::string>> READABLE = {
        {"condition", {"condition"}}, {"time", {"time"}}, {"time+condition", BEFORE_LOOP}};
    if (stage.reads.empty() || stage.gives.empty())
        refuse("stage " + stage.name, "no inputs or no outputs", "some of both");
    for (const TensorSpec& spec : stage.reads) check_source(stage, spec, {"rows"}, sources, READABLE.at(stage.runs));
    for (const TensorSpec& spec : stage.gives) {
        check_shape(stage, spec, with_free({"rows"}, spec.row()));
        sources[spec.name] = {stage.runs, spec.dtype, spec.row()};
    }
}

void check_names(const Stage& stage, const std::vector<TensorSpec>& specs, const std::string& key,
                 const std::map<std::string, FreeShape>& shapes) {
    std::vector<std::string> names, expected;
    for (const TensorSpec& spec : specs) names.push_back(spec.name);
    for (const auto& entry : shapes) expected.push_back(entry.first);
    std::sort(names.begin(), names.end());
    if (names != expected) refuse(text("stage ", stage.name, " ", key), join(names), join(expected));
    for (const TensorSpec& spec : specs) check_shape(stage, spec, shapes.at(spec.name));
}

void check_step(const Manifest& manifest, const Stage& stage, const Sources& sources) {
    const Port& state = manifest.state();
    const FreeShape like_state = with_free({"batch"}, state.shape);
    if (!find(stage.reads, state.name)) refuse(text("stage ", stage.name, " lacks"), state.name, "the state");
    for (const TensorSpec& spec : stage.reads) {
        if (spec.name == state.name)
            check_shape(stage, spec, like_state);
        else if (spec.name == GUIDANCE)
            check_shape(stage, spec, {"batch"});
        else
            check_source(stage, spec, {"groups", "batch"}, sources, BEFORE_LOOP);
    }
    std::map<std::string, FreeShape> gives = {{"prediction", like_state}};
    if (find(stage.gives, "variance")) gives["variance"] = like_state;
    check_names(stage, stage.gives, "gives", gives);
}

void check_update(const Manifest& manifest, const Stage& stage) {
    const FreeShape like_state = with_free({"batch"}, manifest.state().shape);
    check_names(stage, stage.reads, "reads",
                {{manifest.state().name, like_state},
                 {"prediction", like_state},
                 {"previous", like_state},
                 {"coefficients", FreeShape{std::int64_t{2}, std::int64_t{3}}}});
    check_names(stage, stage.gives, "gives", {{"kept", like_state}, {"next", like_state}});
}

void check_end(const Manifest& manifest, const Stage& stage) {
    const Port& state = manifest.state();
    check_names(stage, stage.reads, "reads", {{state.name, with_free({"batch"}, state.shape)}});
    const Shape row = stage.gives.empty() ? Shape() : stage.gives[0].row();
    if (row.size() != 3 || row[0] != 3)
        refuse(text("stage ", stage.name, " gives the shape"), dit_runtime::shown(row), "[3, height, width] a row");
    check_names(stage, stage.gives, "gives", {{"images", with_free({"batch"}, row)}});
}

void check_stages(const Manifest& manifest) {
    std::vector<std::string> stages, tensors = {GUIDANCE};
    std::map<std::string, std::size_t> runs;
    for (const Port& port : manifest.ports) tensors.push_back(port.name);
    for (const Stage& stage : manifest.stages) {
        stages.push_back(stage.name);
        ++runs[stage.runs];
        for (const TensorSpec& spec : stage.gives) tensors.push_back(spec.name);
    }
    if (runs["step"] != 1) refuse("stages that run 'step'", runs["step"], "one");
    for (const char* last : {"update", "end"})
        if (runs[last] > 1) refuse(text("stages that run '", last, "'"), runs[last], "one at most");
    require_distinct("stage", stages);
    require_distinct("port or tensor", tensors);
    Sources sources;
    for (const Port& port : manifest.ports) sources[port.name] = {port.role, port.dtype, port.shape};
    for (const Stage& stage : manifest.stages) {
        std::vector<std::string> inputs, named = stage.files();
        for (const TensorSpec& spec : stage.reads) inputs.push_back(spec.name);
        require_distinct(text("input of stage ", stage.name), inputs);
        if (stage.before_loop()) check_before_loop(stage, sources);
        if (stage.runs == "step") check_step(manifest, stage, sources);
        if (stage.runs == "update") check_update(manifest, stage);
        if (stage.runs == "end") check_end(manifest, stage);
        named.push_back(stage.onnx);
        for (const auto& own : stage.engines) named.insert(named.end(), own.second.begin(), own.second.end());
        for (const auto& name : named)
            if (!manifest.files.count(name)) throw std::invalid_argument(name + " has no size and sha256 under files");
    }
}

void parse_engines(const Json& table, Manifest& manifest) {
    if (!table.contains("built_with") || !table["built_with"].contains("engines")) return;
    for (const auto& backend : json::table(table["built_with"]["engines"], "engines").items())
        for (const auto& engine : json::table(backend.value(), backend.key()).items())
            for (Stage& stage : manifest.stages)
                if (stage.name == engine.key()) stage.built[backend.key()] = parse_built(engine.value());
}

}  // namespace

Manifest parse_table(const Json& table) {
    json::known_keys(table, "the manifest",
                     {"format", "model", "ports", "null", "labels", "guidance", "process", "stages", "files", "source",
                      "built_with", "parity"});
    for (const char* key : {"source", "built_with", "parity"})
        if (table.contains(key)) json::table(table[key], key);
    Manifest manifest;
    const Json& model = json::table(json::need(table, "model"), "model");
    if (model.contains("name") && model["name"].is_string()) manifest.model_name = model["name"].get<std::string>();
    for (const Json& port : json::list(json::need(table, "ports"), "ports")) manifest.ports.push_back(parse_port(port));
    for (const auto& entry : json::table(json::need(table, "null"), "null").items()) {
        const Port* const port = manifest.port(entry.key());
        if (port && port->dtype == "int64") json::integer(entry.value(), "null: " + entry.key(), 0, MOST);
        manifest.null[entry.key()] = json::number(entry.value(), "null: " + entry.key());
    }
    for (const Json& name : json::list(json::need(table, "labels"), "labels"))
        manifest.labels.push_back(json::string(name, "a label"));
    const Json& guidance = json::need(table, "guidance");
    json::known_keys(guidance, "guidance", {"channels", "unguided_up_to_one"});
    manifest.guided_channels = json::integer(json::need(guidance, "channels"), "guidance: channels", 0, MOST);
    if (guidance.contains("unguided_up_to_one"))
        manifest.unguided_up_to_one = json::boolean(guidance["unguided_up_to_one"], "guidance: unguided_up_to_one");
    manifest.process = process_from_json(json::need(table, "process"));
    for (const Json& stage : json::list(json::need(table, "stages"), "stages"))
        manifest.stages.push_back(parse_stage(stage));
    for (const auto& entry : json::table(json::need(table, "files"), "files").items()) {
        json::known_keys(entry.value(), "files: " + entry.key(), {"size", "sha256"});
        const std::string where = "size of " + entry.key();
        const std::int64_t size = json::integer(json::need(entry.value(), "size"), where, 0, INT64_MAX);
        const std::string sum = json::string(json::need(entry.value(), "sha256"), "sha256 of " + entry.key());
        manifest.files[entry.key()] = {static_cast<std::uintmax_t>(size), sum};
    }
    check_ports(manifest);
    check_null(manifest);
    check_stages(manifest);
    parse_engines(table, manifest);
    auto& stages = manifest.stages;
    stages.erase(
        std::remove_if(stages.begin(), stages.end(), [](const Stage& stage) { return stage.runs == "update"; }),
        stages.end());
    return manifest;
}

}  // namespace dit_runtime
