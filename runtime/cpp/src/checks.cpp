// Mirrors dit_runtime/bundle/checks.py.
#include "checks.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <tuple>

#include "facts.hpp"
#include "json.hpp"

namespace dit_runtime {
namespace {

using json::refuse;

// A tensor that stages may read: what it depends on, its dtype and a row's shape.
struct Source {
    std::string role, dtype;
    Shape row;
};
using Sources = std::map<std::string, Source>;
using FreeShape = std::vector<std::variant<std::int64_t, std::string>>;

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

void require_distinct(const std::string& what, std::vector<std::string> names) {
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end())
        throw std::invalid_argument(text(what, " '", *twice, "' is listed more than once, expected once"));
}

void check_ports(const Manifest& manifest) {
    for (const Port& port : manifest.ports)
        if (contains(RESERVED, port.name))
            throw std::invalid_argument(
                text("a port is called '", port.name, "', as a tensor of a bundle's stages; give it another name"));
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
    const Guidance& guidance = manifest.guidance;
    if (guidance.channels < 1 || guidance.channels > state.shape[0])
        refuse("guidance: channels", guidance.channels, text("1 to ", state.shape[0]));
    if (std::abs(guidance.weight) > double{std::numeric_limits<float>::max()})
        refuse("guidance: default", guidance.weight, "a number of float32");
    const Port* const weight = manifest.port(guidance.port);
    const bool scalar = weight && weight->role == "condition" && weight->dtype == "float32" && weight->shape.empty();
    if (!guidance.port.empty() && (!scalar || manifest.null.count(guidance.port)))
        refuse("guidance: port", guidance.port, "a condition port of float32 [] without a constant in null");
    std::vector<std::string> masked, pictures;
    for (const Port& port : manifest.ports) {
        if (port.picture) {
            if (port.role != "condition" || !port.masks.empty() || port.dtype != state.dtype ||
                port.shape != state.shape)
                refuse(
                    "port of a picture: " + port.name,
                    port.role + " " + port.dtype + " " + dit_runtime::shown(port.shape),
                    text("a condition port of ", state.dtype, " ", dit_runtime::shown(state.shape), ", as the state"));
            pictures.push_back(port.name);
        }
        if (port.masks.empty()) continue;
        const Port* const other = manifest.port(port.masks);
        if (port.role != "condition" || !other || other == &port || other->role != "condition" ||
            !other->masks.empty() || other->shape.empty())
            refuse(text("port ", port.name, ": masks"), "'" + port.masks + "'",
                   "a condition port that has tokens and is no mask");
        if (port.shape != Shape{other->shape[0]})
            refuse(text("port ", port.name, ": shape"), dit_runtime::shown(port.shape),
                   dit_runtime::shown({other->shape[0]}));
        if (port.dtype == "int64" && port.size < 2)
            refuse(text("port ", port.name, ": size"), port.size, "2 or more, for it is a mask");
        masked.push_back(port.masks);
    }
    require_distinct("masked port", masked);
    if (pictures.size() > 1) refuse("ports of a picture", join(pictures), "one at most");
    if (!manifest.labels.empty() && static_cast<std::int64_t>(manifest.labels.size()) != manifest.classes())
        refuse("labels", text(manifest.labels.size(), " names"), std::to_string(manifest.classes()));
}

void check_null(const Manifest& manifest) {
    for (const auto& [name, value] : manifest.null) {
        const Port* const port = manifest.port(name);
        if (!port || port->role != "condition") refuse("null", name, "a condition port");
        if (port->dtype == "int64" && (value != std::floor(value) || value < 0 || value >= double(port->size)))
            refuse("null: " + name, value, text("0 to ", port->size - 1));
        if (std::abs(value) > double{std::numeric_limits<float>::max()})
            refuse("null: " + name, value, "a number of float32");
        if (!port->masks.empty() && value != 1) refuse("null: " + name, value, "1, for it is a mask");
    }
    if (manifest.classes() > limit("classes"))
        refuse(text("port ", LABELS), text(manifest.classes(), " classes"), text("at most ", limit("classes")));
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

void check_names(const Stage& stage, const std::vector<TensorSpec>& specs, const std::string& key,
                 const std::map<std::string, FreeShape>& shapes, const std::string& dtype = "float32") {
    std::vector<std::string> names, expected;
    for (const TensorSpec& spec : specs) names.push_back(spec.name);
    for (const auto& entry : shapes) expected.push_back(entry.first);
    std::sort(names.begin(), names.end());
    if (names != expected) refuse(text("stage ", stage.name, " ", key), join(names), join(expected));
    for (const TensorSpec& spec : specs) check_shape(stage, spec, shapes.at(spec.name), dtype);
}

// The prompt stage reads all token ids and their masks, and gives condition ports as a request would bring them.
void check_prompt(const Manifest& manifest, const Stage& stage) {
    std::map<std::string, FreeShape> reads, gives;
    std::vector<std::string> names;
    for (const Prompt& prompt : manifest.prompts)
        for (const std::string& name : {prompt.ids, prompt.mask})
            if (!name.empty()) reads[name] = {"rows", prompt.tokens}, names.push_back(name);
    require_distinct("input of prompts", names);
    check_names(stage, stage.reads, "reads", reads, "int64");
    for (const TensorSpec& spec : stage.gives) {
        const Port* const port = manifest.port(spec.name);
        if (!port || port->role != "condition" || port->name == manifest.guidance.port)
            refuse(text("stage ", stage.name, " gives"), spec.name, "a condition port");
        gives[spec.name] = with_free({"rows"}, port->shape);
        if (const auto null = manifest.null.find(spec.name); null != manifest.null.end())
            refuse("null: " + spec.name, null->second, text("none, for the ", stage.name, " stage gives it"));
    }
    if (gives.empty()) refuse(text("stage ", stage.name, " gives"), "nothing", "condition ports");
    for (const Port& port : manifest.ports)
        if (!port.masks.empty() && gives.count(port.name) != gives.count(port.masks))
            refuse(text("stage ", stage.name, " gives"), gives.count(port.name) ? port.name : port.masks,
                   text("both ", port.masks, " and ", port.name, ", or none"));
    check_names(stage, stage.gives, "gives", gives);
}

void check_prompts(const Manifest& manifest) {
    const Stage* const stage = manifest.prompt();
    if (!stage != manifest.prompts.empty())
        refuse("prompts", manifest.prompts.size(),
               text(stage ? "one or more" : "none", ", as inputs of a stage that runs 'prompt'"));
    if (stage && stage != &manifest.stages.front())
        refuse("the first stage runs", manifest.stages.front().runs, PROMPT);
    for (const Prompt& prompt : manifest.prompts)
        if (!manifest.files.count(prompt.tokenizer))
            throw std::invalid_argument(prompt.tokenizer + " has no size and sha256 under files");
}

void check_before_loop(const Stage& stage, Sources& sources) {
    // The roles that a stage before the loop may depend on.
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

// Refuses an encoder of other pictures than the end stage gives, or of other latents than the state.
void check_start(const Manifest& manifest, const Stage& stage) {
    const Shape& state = manifest.state().shape;
    const Shape row = stage.reads.empty() ? Shape() : stage.reads[0].row();
    const bool whole = row.size() == 3 && state.size() == 3 && row[0] == 3;
    if (!whole || row[1] % state[1] || row[2] % state[2])
        refuse(text("stage ", stage.name, " reads the shape"), dit_runtime::shown(row),
               "[3, height, width] a row, multiples of a state [channels, height, width]");
    if (!manifest.end())
        refuse(text("stage ", stage.name), "no stage that runs 'end'", "one, which gives its pictures");
    if (!manifest.end()->gives.empty() && manifest.image_shape() != row)
        refuse(text("stage ", stage.name, " reads the shape"), dit_runtime::shown(row),
               text(dit_runtime::shown(manifest.image_shape()), ", as ", manifest.end()->name));
    check_names(stage, stage.reads, "reads", {{"images", with_free({"batch"}, row)}});
    std::map<std::string, FreeShape> gives = {{MEAN, with_free({"batch"}, state)}};
    if (stage.gives.size() != 1) gives[LOGVAR] = with_free({"batch"}, state);  // else latents without a variance
    check_names(stage, stage.gives, "gives", gives);
}

void check_step(const Manifest& manifest, const Stage& stage, const Sources& sources) {
    const Port& state = manifest.state();
    const FreeShape like_state = with_free({"batch"}, state.shape);
    if (!find(stage.reads, state.name)) refuse(text("stage ", stage.name, " lacks"), state.name, "the state");
    for (const TensorSpec& spec : stage.reads) {
        if (spec.name == state.name)
            check_shape(stage, spec, like_state);
        else if (spec.name != GUIDANCE)
            check_source(stage, spec, {"groups", "batch"}, sources, BEFORE_LOOP);
        else if (manifest.conditions().empty())
            refuse(text("stage ", stage.name, " reads ", GUIDANCE), "no condition port", "at least one");
        else if (!manifest.guidance.port.empty())
            refuse(text("stage ", stage.name, " reads ", GUIDANCE), text("guidance: port ", manifest.guidance.port),
                   "one of the two");
        else
            check_shape(stage, spec, {"batch"});
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
    if ((row.size() != 3 && row.size() != 4) || row[0] != 3)
        refuse(text("stage ", stage.name, " gives the shape"), dit_runtime::shown(row),
               "[3, height, width] a row, or frames before the height");
    check_names(stage, stage.gives, "gives", {{"images", with_free({"batch"}, row)}});
}

void check_stages(const Manifest& manifest) {
    std::vector<std::string> stages, tensors = {GUIDANCE};
    std::map<std::string, std::size_t> runs;
    for (const Port& port : manifest.ports) tensors.push_back(port.name);
    for (const Stage& stage : manifest.stages) {
        stages.push_back(stage.name);
        ++runs[stage.runs];
        for (const TensorSpec& spec : stage.runs == PROMPT ? stage.reads : stage.gives) tensors.push_back(spec.name);
    }
    if (runs["step"] != 1) refuse("stages that run 'step'", runs["step"], "one");
    for (const char* once : {PROMPT, START, "update", "end"})
        if (runs[once] > 1) refuse(text("stages that run '", once, "'"), runs[once], "one at most");
    require_distinct("stage", stages);
    require_distinct("port or tensor", tensors);
    Sources sources;
    for (const Port& port : manifest.ports) sources[port.name] = {port.role, port.dtype, port.shape};
    for (const Stage& stage : manifest.stages) {
        std::vector<std::string> inputs, named = stage.files();
        for (const TensorSpec& spec : stage.reads) inputs.push_back(spec.name);
        require_distinct(text("input of stage ", stage.name), inputs);
        if (stage.runs == PROMPT) check_prompt(manifest, stage);
        if (stage.before_loop()) check_before_loop(stage, sources);
        if (stage.runs == START) check_start(manifest, stage);
        if (stage.runs == "step") check_step(manifest, stage, sources);
        if (stage.runs == "update") check_update(manifest, stage);
        if (stage.runs == "end") check_end(manifest, stage);
        named.push_back(stage.onnx);
        named.insert(named.end(), stage.shared.begin(), stage.shared.end());
        for (const auto& own : stage.engines) named.insert(named.end(), own.second.begin(), own.second.end());
        for (const auto& name : named)
            if (!manifest.files.count(name)) throw std::invalid_argument(name + " has no size and sha256 under files");
    }
}

bool same(const std::vector<TensorSpec>& some, const std::vector<TensorSpec>& others) {
    const auto equal = [](const TensorSpec& one, const TensorSpec& other) {
        return std::tie(one.name, one.dtype, one.shape) == std::tie(other.name, other.dtype, other.shape);
    };
    return std::equal(some.begin(), some.end(), others.begin(), others.end(), equal);
}

bool same(const Stage& one, const Stage& other) {
    const auto key = [](const Stage& stage) {
        return std::tie(stage.name, stage.runs, stage.onnx, stage.shared, stage.max_batch, stage.precision,
                        stage.backend, stage.engines);
    };
    return key(one) == key(other) && same(one.reads, other.reads) && same(one.gives, other.gives);
}

}  // namespace

void check_sizes(const Manifest& manifest) {
    if (manifest.sizes.empty()) return;
    std::vector<std::string> names, suffixes;
    std::map<std::string, Stage> stages;
    std::vector<Manifest> sizes = manifest.sizes;
    sizes.insert(sizes.begin(), manifest);
    for (const Manifest& size : sizes) {
        if (size.size.empty() || size.size != size_name(size.size))
            refuse("size", size.size, "the name of a size, such as 512 or 512x768");
        names.push_back(size.size);
        suffixes.push_back(size.suffix);
        for (const Stage& stage : size.stages)
            if (!same(stages.emplace(stage.name, stage).first->second, stage))
                refuse("stage " + stage.name, "another one in another size", "the same stage, or another name");
    }
    require_distinct("size", names);
    require_distinct("suffix", suffixes);
}

void check(const Manifest& manifest) {
    check_ports(manifest);
    check_null(manifest);
    check_prompts(manifest);
    check_stages(manifest);
}

}  // namespace dit_runtime
