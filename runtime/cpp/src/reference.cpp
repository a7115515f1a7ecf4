#include "reference.hpp"

#include <algorithm>
#include <cmath>

#include "errors.hpp"
#include "facts.hpp"

namespace dit_runtime {

const std::size_t FINGERPRINTS = static_cast<std::size_t>(constant("fingerprints"));
const std::uint64_t FINGERPRINT_SEED = static_cast<std::uint64_t>(constant("fingerprint_seed"));

namespace {

Rows conditions(const Manifest& manifest, const std::map<std::string, NpyArray>& arrays, const std::string& prefix,
                std::size_t rows) {
    Rows condition{rows};
    for (const Port& port : manifest.conditions()) {
        const std::string name = prefix + "." + port.name;
        const auto array = arrays.find(name);
        if (array == arrays.end()) throw NpyError("it lacks " + name);
        const Shape expected = with_rows(rows, port.shape);
        if (array->second.shape != expected)
            throw NpyError(text(name, " has shape ", shown(array->second.shape), ", expected ", shown(expected)));
        Tensor tensor{expected};
        if (port.dtype == "int64")
            tensor.integers = array->second.as<std::int64_t>();
        else
            tensor.floats = array->second.as<float>();
        condition.arrays[port.name] = std::move(tensor);
    }
    try {
        fit(manifest.conditions(), condition.arrays, "its " + prefix);
    } catch (const UsageError& error) {
        throw NpyError(error.what());
    }
    return condition;
}

// The single condition port of a network, if it is a label; else NULL.
const Port* lone_label(const Manifest& manifest) {
    const std::vector<Port> ports = manifest.conditions();
    const bool lone = ports.size() == 1 && ports[0].dtype == "int64" && ports[0].shape.empty();
    return lone ? manifest.port(ports[0].name) : nullptr;
}

}  // namespace

Rows fingerprinted(const Manifest& manifest, const Reference& reference) {
    const Port* const label = lone_label(manifest);
    if (manifest.conditions().empty()) return {reference.batch() + 1};
    if (!label) return stack(reference.condition, reference.negative);
    Tensor values{{label->size}};
    for (std::int64_t value = 0; value < label->size; ++value) values.integers.push_back(value);
    return {static_cast<std::size_t>(label->size), {{label->name, std::move(values)}}};
}

Reference load_reference(const Pipeline& pipe) {
    const Manifest& manifest = pipe.manifest;
    const std::string folder = pipe.folder.string(), name = manifest.own(REFERENCE);
    try {
        auto arrays = parse_npz(read_bytes(inside(pipe.folder, name)));
        std::vector<std::string> missing;
        for (const char* array : {"betas", "timesteps", "seeds", "guidance", "latents", "prediction", "conditional",
                                  "null", "variance", "fingerprint", "images"})
            if (!arrays.count(array)) missing.push_back(array);
        if (!missing.empty()) throw NpyError("it lacks " + join(missing));
        Reference reference = {arrays["betas"].as<double>(),
                               arrays["timesteps"].as<double>(),
                               arrays["seeds"].as<std::int64_t>(),
                               arrays["guidance"].as<float>(),
                               arrays["latents"].as<float>(),
                               arrays["prediction"].as<float>(),
                               arrays["conditional"].as<float>(),
                               arrays["null"].as<float>(),
                               arrays["variance"].as<float>(),
                               arrays["fingerprint"].as<float>(),
                               arrays["images"].as<std::uint8_t>(),
                               {},
                               {}};
        const std::size_t steps = reference.timesteps.size(), batch = reference.batch();
        const std::size_t each = batch * count(manifest.state().shape);
        const auto expect = [](const char* array, std::size_t size, std::size_t expected) {
            if (size != expected) throw NpyError(text(array, " has ", size, " numbers, expected ", expected));
        };
        if (steps == 0 || batch == 0) throw NpyError("it has no steps or no seeds");
        const std::string& solver = manifest.process.sampler.solver;
        if (const auto each_step = static_cast<std::size_t>(evaluations(solver)); steps % each_step)
            throw NpyError(text("timesteps has ", steps, " numbers, expected ", each_step, " a step of ", solver));
        reference.condition = conditions(manifest, arrays, "condition", batch);
        const auto has_null = [&](const Port& port) { return arrays.count("null." + port.name) != 0; };
        const std::vector<Port> ports = manifest.conditions();
        if (manifest.mixes_guidance() || std::any_of(ports.begin(), ports.end(), has_null))
            reference.negative = conditions(manifest, arrays, "null", 1);
        expect("guidance", reference.guidance.size(), batch);
        expect("latents", reference.latents.size(), (steps + 1) * each);
        expect("prediction", reference.prediction.size(), steps * each);
        expect("conditional", reference.conditional.size(), steps * each);
        if (manifest.mixes_guidance() || !reference.null.empty()) expect("null", reference.null.size(), steps * each);
        expect("fingerprint", reference.fingerprint.size(), fingerprinted(manifest, reference).rows * FINGERPRINTS);
        if (!reference.variance.empty()) expect("variance", reference.variance.size(), steps * each);
        const Shape image = manifest.image_shape();
        if (!reference.images.empty() && image.empty())
            throw BundleError(folder + ": the decoder is gone, its reference has pictures");
        if (!image.empty()) expect("images", reference.images.size(), batch * count(image));
        return reference;
    } catch (const NpyError& error) {
        throw BundleError(text(folder, ": ", name, " cannot be read: ", error.what(), "; rebuild the bundle"));
    }
}

std::vector<float> fingerprint(Pipeline& pipe, const Rows& conditions, double timestep) {
    std::vector<std::string> tensors;
    std::size_t width = 0, chunk = 0;
    for (const TensorSpec& spec : pipe.manifest.step().reads) {
        if (!spec.starts("groups") || pipe.manifest.port(spec.name)) continue;
        tensors.push_back(spec.name);
        width += count(spec.row());
    }
    for (const Stage& stage : pipe.manifest.stages)
        if (const auto size = static_cast<std::size_t>(stage.max_batch); stage.before_loop())
            chunk = chunk ? std::min(chunk, size) : size;
    chunk = std::max<std::size_t>(1, chunk);
    const Projection project(width);
    std::vector<float> prints;
    for (std::size_t first = 0; first < conditions.rows; first += chunk) {
        const std::size_t rows = std::min(chunk, conditions.rows - first);
        Memo memo = pipe.memo({timestep}, slice(conditions, first, first + rows));
        const Arrays& inputs = memo(0, 0, rows);
        std::vector<float> joined;  // (rows, width)
        joined.reserve(rows * width);
        for (std::size_t row = 0; row < rows; ++row)
            for (const std::string& name : tensors) {
                const std::vector<float>& values = inputs.at(name).floats;
                const auto size = static_cast<std::ptrdiff_t>(values.size() / rows);
                const auto begin = values.begin() + static_cast<std::ptrdiff_t>(row) * size;
                joined.insert(joined.end(), begin, begin + size);
            }
        const std::vector<float> some = project(joined, rows);
        prints.insert(prints.end(), some.begin(), some.end());
    }
    return prints;
}

PromptReference load_prompts(const Pipeline& pipe) {
    try {
        auto arrays = parse_npz(read_bytes(inside(pipe.folder, PROMPTS)));
        const auto at = [&](const std::string& name) -> const NpyArray& {
            const auto array = arrays.find(name);
            if (array == arrays.end()) throw NpyError("it lacks " + name);
            return array->second;
        };
        const std::vector<Port> ports = prompt_ports(pipe.manifest);
        Arrays ids;
        for (const Port& port : ports) ids[port.name] = {at(port.name).shape, {}, at(port.name).as<std::int64_t>()};
        PromptReference reference;
        reference.ids = fit(ports, ids, PROMPTS);
        for (const TensorSpec& spec : pipe.manifest.prompt()->gives) {
            const std::string name = "fingerprint." + spec.name;
            const Shape expected = {static_cast<std::int64_t>(reference.ids.rows),
                                    static_cast<std::int64_t>(FINGERPRINTS)};
            if (at(name).shape != expected)
                throw NpyError(text(name, " has shape ", shown(at(name).shape), ", expected ", shown(expected)));
            reference.fingerprints[spec.name] = at(name).as<float>();
        }
        return reference;
    } catch (const std::runtime_error& error) {  // NpyError, UsageError
        throw BundleError(
            text(pipe.folder.string(), ": ", PROMPTS, " does not fit: ", error.what(), "; rebuild the bundle"));
    }
}

Projection::Projection(std::size_t width)
    : width_(width), directions_(Noise(FINGERPRINT_SEED).normal(width * FINGERPRINTS)) {}

std::vector<float> Projection::operator()(const std::vector<float>& values, std::size_t rows) const {
    std::vector<float> prints;
    for (std::size_t row = 0; row < rows; ++row) {
        Array sums(FINGERPRINTS);
        for (std::size_t i = 0; i < width_; ++i)
            for (std::size_t print = 0; print < FINGERPRINTS; ++print)
                sums[print] += static_cast<double>(values[row * width_ + i]) * directions_[i * FINGERPRINTS + print];
        for (const double sum : sums)
            prints.push_back(static_cast<float>(sum / std::sqrt(std::max(1.0, static_cast<double>(width_)))));
    }
    return prints;
}

}  // namespace dit_runtime
