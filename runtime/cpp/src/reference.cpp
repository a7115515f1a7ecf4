#include "reference.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "call.hpp"
#include "errors.hpp"
#include "facts.hpp"

namespace dit_runtime {

const std::size_t FINGERPRINTS = static_cast<std::size_t>(constant("fingerprints"));
const std::uint64_t FINGERPRINT_SEED = static_cast<std::uint64_t>(constant("fingerprint_seed"));

namespace {

constexpr double FLOAT_MOST = std::numeric_limits<float>::max();

// The arrays of an .npz file, each read once with its shape and its numbers checked.
class CheckedArrays {
  public:
    CheckedArrays(const Pipeline& pipe, const std::string& name)
        : arrays_(unless_cancelled([content = read_checked(pipe.folder, pipe.manifest, name,
                                                           static_cast<std::uintmax_t>(limit("reference_bytes")))] {
              return parse_npz(content);
          })) {}

    bool has(const std::string& name) const { return arrays_.count(name) != 0; }

    const NpyArray& at(const std::string& name) const {
        const auto array = arrays_.find(name);
        if (array == arrays_.end()) throw NpyError("it lacks " + name);
        return array->second;
    }

    // The numbers of an array of this shape.
    template <typename T>
    std::vector<T> read(const std::string& name, const Shape& expected) const {
        const NpyArray& array = at(name);
        if (array.shape != expected)
            throw NpyError(text(name, " has shape ", shown(array.shape), ", expected ", shown(expected)));
        try {
            std::vector<T> values = array.as<T>();
            if constexpr (std::is_floating_point_v<T>)
                if (!std::all_of(values.begin(), values.end(), [](T value) { return std::abs(value) <= FLOAT_MOST; }))
                    throw NpyError("it holds values that are not finite, or too large for float32");
            return values;
        } catch (const NpyError& error) {
            throw NpyError(text(name, ": ", error.what()));
        }
    }

    // The same of an array that may be empty.
    template <typename T>
    std::vector<T> read_or_none(const std::string& name, const Shape& expected) const {
        return at(name).size() ? read<T>(name, expected) : std::vector<T>();
    }

    // The length of a list of 1 to so many numbers.
    std::size_t length(const std::string& name, std::int64_t most) const {
        const Shape& shape = at(name).shape;
        if (shape.size() != 1 || shape[0] < 1 || shape[0] > most)
            throw NpyError(text(name, " has shape ", shown(shape), ", expected [1] to [", most, "]"));
        return static_cast<std::size_t>(shape[0]);
    }

  private:
    const std::map<std::string, NpyArray> arrays_;
};

Rows conditions(const Manifest& manifest, const CheckedArrays& arrays, const std::string& prefix, std::size_t rows) {
    Rows condition{rows};
    for (const Port& port : manifest.conditions()) {
        const std::string name = prefix + "." + port.name;
        Tensor tensor{with_rows(rows, port.shape)};
        if (port.dtype == "int64")
            tensor.integers = arrays.read<std::int64_t>(name, tensor.shape);
        else
            tensor.floats = arrays.read<float>(name, tensor.shape);
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

std::vector<std::uint8_t> Reference::shown(std::vector<std::uint8_t> pictures, const Shape& shape) const {
    if (frames.empty()) return pictures;
    const std::size_t all = static_cast<std::size_t>(shape.at(1)), frame = count(shape) / all;
    std::vector<std::uint8_t> chosen;
    for (std::size_t video = 0; video < pictures.size() / (all * frame); ++video)
        for (const std::int64_t number : frames) {
            const auto first = pictures.begin() +
                               static_cast<std::ptrdiff_t>((video * all + static_cast<std::size_t>(number)) * frame);
            chosen.insert(chosen.end(), first, first + static_cast<std::ptrdiff_t>(frame));
        }
    return chosen;
}

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
        const CheckedArrays arrays(pipe, name);
        std::vector<std::string> missing;
        for (const char* array : {"betas", "timesteps", "seeds", "guidance", "latents", "prediction", "conditional",
                                  "null", "variance", "fingerprint", "images"})
            if (!arrays.has(array)) missing.push_back(array);
        const std::vector<TensorSpec> latents = manifest.start() ? manifest.start()->gives : std::vector<TensorSpec>();
        for (const TensorSpec& spec : latents)
            if (!arrays.has("encoded." + spec.name)) missing.push_back("encoded." + spec.name);
        if (!missing.empty()) throw NpyError("it lacks " + join(missing));
        const std::string& solver = manifest.process.sampler.solver;
        const std::int64_t each_step = evaluations(solver);
        const std::int64_t most = std::min(limit("evaluations"), manifest.process.train_steps * each_step);
        const std::size_t steps = arrays.length("timesteps", most), batch = arrays.length("seeds", limit("samples"));
        if (steps % static_cast<std::size_t>(each_step))
            throw NpyError(text("timesteps has ", steps, " numbers, expected ", each_step, " a step of ", solver));
        const Shape sample = with_rows(batch, manifest.state().shape);
        const Shape run = with_rows(steps, sample), states = with_rows(steps + 1, sample);
        const Shape& betas = arrays.at("betas").shape;
        const Shape image = manifest.image_shape();
        if (arrays.at("images").size() && image.empty())
            throw BundleError(folder + ": the decoder is gone, its reference has pictures");
        Reference reference;
        reference.betas = arrays.read<double>("betas", {betas.empty() ? 0 : betas[0]});
        reference.timesteps = arrays.read<double>("timesteps", {static_cast<std::int64_t>(steps)});
        const double last = std::max(1.0, static_cast<double>(manifest.process.train_steps));
        for (const double time : reference.timesteps)
            if (time < 0 || time > last) throw NpyError(text("timesteps: it holds ", time, ", expected 0 to ", last));
        reference.seeds = arrays.read<std::int64_t>("seeds", {static_cast<std::int64_t>(batch)});
        reference.guidance = arrays.read<float>("guidance", {static_cast<std::int64_t>(batch)});
        reference.latents = arrays.read<float>("latents", states);
        reference.prediction = arrays.read<float>("prediction", run);
        reference.conditional = arrays.read<float>("conditional", run);
        reference.null =
            manifest.mixes_guidance() ? arrays.read<float>("null", run) : arrays.read_or_none<float>("null", run);
        reference.variance = find(manifest.step().gives, "variance") ? arrays.read<float>("variance", run)
                                                                     : arrays.read_or_none<float>("variance", run);
        if (!image.empty()) {
            Shape pictures(image.begin() + 1, image.end());
            if (arrays.has("frames") && arrays.at("frames").size()) {
                const Shape& frames = arrays.at("frames").shape;
                reference.frames = arrays.read<std::int64_t>("frames", {frames.empty() ? 0 : frames[0]});
                for (const std::int64_t frame : reference.frames)
                    if (frame < 0 || frame >= manifest.frames())
                        throw NpyError(text("frames hold ", frame, ", expected numbers of a video's frames"));
                pictures[0] = static_cast<std::int64_t>(reference.frames.size());
            }
            pictures.push_back(image[0]);
            reference.images = arrays.read<std::uint8_t>("images", with_rows(batch, pictures));
        }
        for (const TensorSpec& spec : latents)
            reference.encoded[spec.name] = arrays.read<float>("encoded." + spec.name, sample);
        reference.condition = conditions(manifest, arrays, "condition", batch);
        const auto has_null = [&](const Port& port) { return arrays.has("null." + port.name); };
        const std::vector<Port> ports = manifest.conditions();
        if (manifest.mixes_guidance() || std::any_of(ports.begin(), ports.end(), has_null))
            reference.negative = conditions(manifest, arrays, "null", 1);
        if (const Port* const label = lone_label(manifest); label && label->size > limit("classes") + 1)
            throw NpyError(text("port ", label->name, " has ", label->size, " values, expected at most ",
                                limit("classes"), " and a null"));
        reference.fingerprint = arrays.read<float>("fingerprint", with_rows(fingerprinted(manifest, reference).rows,
                                                                            {static_cast<std::int64_t>(FINGERPRINTS)}));
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
        const CheckedArrays arrays(pipe, PROMPTS);
        const std::vector<Port> ports = prompt_ports(pipe.manifest);
        Arrays ids;
        for (const Port& port : ports) {
            const NpyArray& array = arrays.at(port.name);
            ids[port.name] = {array.shape, {}, array.as<std::int64_t>()};
        }
        PromptReference reference;
        reference.ids = fit(ports, ids, PROMPTS);
        for (const TensorSpec& spec : pipe.manifest.prompt()->gives)
            reference.fingerprints[spec.name] = arrays.read<float>(
                "fingerprint." + spec.name, with_rows(reference.ids.rows, {static_cast<std::int64_t>(FINGERPRINTS)}));
        return reference;
    } catch (const BundleError&) {
        throw;
    } catch (const std::runtime_error& error) {  // NpyError, UsageError
        throw BundleError(
            text(pipe.folder.string(), ": ", PROMPTS, " does not fit: ", error.what(), "; rebuild the bundle"));
    }
}

Projection::Projection(std::size_t width)
    : width_(width),
      directions_(unless_cancelled([width] { return Noise(FINGERPRINT_SEED).normal(width * FINGERPRINTS); })) {}

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
