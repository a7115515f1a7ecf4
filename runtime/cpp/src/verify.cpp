#include "verify.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "call.hpp"
#include "errors.hpp"
#include "facts.hpp"
#include "images.hpp"
#include "reference.hpp"

namespace dit_runtime {
namespace {

std::map<std::string, Tolerances> read_tolerances() {
    std::map<std::string, Tolerances> table;
    for (const auto& entry : facts().at("tolerances").items()) {
        const auto limit = [&](const char* name) { return entry.value().at(name).get<double>(); };
        table[entry.key()] = {limit("conditioner"),
                              limit("prediction"),
                              limit("guided"),
                              limit("latents"),
                              limit("encoded"),
                              limit("pictures"),
                              entry.value().at("nearest").get<bool>()};
    }
    return table;
}

}  // namespace

const std::map<std::string, Tolerances> TOLERANCES = read_tolerances();
const double NOISE_ATOL = facts().at("noise_atol").get<double>();
const double CONTRAST = facts().at("contrast").get<double>();

namespace {

// Evaluations and steps of the reference's replay that are done, of those that are expected in all sizes.
void count_steps(std::size_t steps, std::size_t expected = 0) {
    const auto& progress = current_call().progress;
    if (!progress || progress->of_bytes) return;
    progress->expect(expected);
    progress->add(steps);
}

const char* const INVARIANCE = "a row in a batch and alone, max abs difference";

// ||value − reference|| / ||reference||; NaN and inf stay what they are.
double relative_error(const std::vector<float>& value, const float* reference) {
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < value.size(); ++i) {
        const double expected = reference[i], gap = value[i] - expected;
        difference += gap * gap;
        norm += expected * expected;
    }
    return std::sqrt(difference) / std::max(std::sqrt(norm), 1e-30);
}

// The places where two arrays differ; every place if their lengths do.
std::vector<std::size_t> differences(const Array& values, const Array& reference) {
    std::vector<std::size_t> places;
    for (std::size_t index = 0; index < std::max(values.size(), reference.size()); ++index)
        if (values.size() != reference.size() || values[index] != reference[index]) places.push_back(index);
    return places;
}

// The row of fingerprints that differs most from PyTorch's, and by how much; NaN differs most.
std::pair<std::size_t, double> worst_row(const std::vector<float>& prints, const std::vector<float>& expected) {
    std::pair<std::size_t, double> worst = {0, -1};
    for (std::size_t index = 0; index * FINGERPRINTS < prints.size(); ++index) {
        const auto row = prints.begin() + static_cast<std::ptrdiff_t>(index * FINGERPRINTS);
        const double error = relative_error({row, row + FINGERPRINTS}, &expected[index * FINGERPRINTS]);
        if (std::isnan(worst.second) || error <= worst.second) continue;
        worst = {index, error};
    }
    return worst;
}

// Runs the prompt stage on the ids of prompts.npz; one figure a port that it gives. Its encoders keep to the limit of
// an evaluation, as they are networks of their own.
void check_prompts(Pipeline& pipe, const OnFigure& on_figure) {
    const Stage* const stage = pipe.manifest.prompt();
    if (!stage) return;
    if (!pipe.manifest.files.count(PROMPTS))
        throw BundleError(text(pipe.folder.string(), ": ", PROMPTS,
                               " is not in the manifest, and nothing else checks the ", stage->name,
                               " stage; rebuild the bundle"));
    const PromptReference reference = load_prompts(pipe);
    const double limit = TOLERANCES.at(pipe.manifest.step().precision).prediction;
    const Rows conditions = pipe.encode(reference.ids);
    for (const TensorSpec& spec : stage->gives) {
        const Projection project(count(spec.row()));
        const std::vector<float> prints = project(conditions.arrays.at(spec.name).floats, conditions.rows);
        const auto [row, error] = worst_row(prints, reference.fingerprints.at(spec.name));
        const std::string metric = spec.name + " of ids, fingerprint, rel-L2";
        on_figure({stage->name, metric, error, limit, false, {}, text("prompt ", row)});
    }
}

void check_before_loop(Pipeline& pipe, const Reference& reference, double limit, const OnFigure& on_figure) {
    const double middle = reference.timesteps[reference.timesteps.size() / 2];
    const std::vector<float> prints = fingerprint(pipe, fingerprinted(pipe.manifest, reference), middle);
    const auto [place, worst] = worst_row(prints, reference.fingerprint);
    std::vector<std::string> stages;
    for (const Stage& stage : pipe.manifest.stages)
        if (stage.before_loop()) stages.push_back(stage.name);
    const bool labels = pipe.manifest.classes() && pipe.manifest.conditions().size() == 1;
    on_figure({join(stages, "+"),
               "fingerprint, rel-L2",
               worst,
               limit,
               false,
               {},
               text(labels ? "label " : "condition ", place)});
}

// Encodes the reference's pictures; one figure an output, in dB by its own range.
void check_encoder(Pipeline& pipe, const Reference& reference, const OnFigure& on_figure) {
    const Stage* const stage = pipe.manifest.start();
    if (!stage) return;
    Encoded encoded;
    std::string where;
    try {
        const Shape shape = pipe.manifest.picture_shape();
        encoded =
            pipe.encode_pictures(to_unit(reference.images, with_rows(reference.batch(), {shape[1], shape[2], 3})));
    } catch (const EngineError& error) {
        where = error.what();
    }
    for (const TensorSpec& spec : stage->gives) {
        const std::vector<float>&expected = reference.encoded.at(spec.name), &values = encoded[spec.name];
        const auto [least, most] = std::minmax_element(expected.begin(), expected.end());
        const double range = static_cast<double>(*most - *least);
        const double ratio = values.size() == expected.size()
                                 ? psnr(values.data(), expected.data(), values.size(), range > 0 ? range : 1.0)
                                 : std::nan("");
        on_figure({stage->name,
                   spec.name + " of pictures, PSNR in dB",
                   ratio,
                   TOLERANCES.at(stage->precision).encoded,
                   true,
                   {},
                   where});
    }
}

// Evaluates the network at the reference's latents: each step's error is the engine's own.
void teacher_forced(Pipeline& pipe, const Reference& reference, const Tolerances& limits, const OnFigure& on_figure) {
    const std::size_t steps = reference.timesteps.size();
    const std::size_t each = reference.batch() * count(pipe.manifest.state().shape);
    const bool guided = pipe.manifest.mixes_guidance();
    Memo memo = pipe.memo(reference.timesteps, reference.condition, reference.negative, {}, MEMO_BYTES, pipe.device());
    for (std::size_t step = 0; step < steps; ++step) {
        count_steps(1);
        const std::string where = text("step ", step + 1, " of ", steps, ", t = ", reference.timesteps[step]);
        const float* const state = &reference.latents[step * each];
        const auto denoise = [&](Groups groups) {
            return pipe.denoise(
                {state, state + each},
                [&](std::size_t first, std::size_t last) -> const Arrays& { return memo(step, first, last, groups); },
                reference.guidance);
        };
        const auto report = [&](const char* name, const std::vector<float>& values, const std::vector<float>& expected,
                                double limit) {
            on_figure({pipe.manifest.step().name, text(name, ", rel-L2"),
                       relative_error(values, &expected[step * each]), limit, false, step + 1, where});
        };
        const Prediction both = denoise(guided ? Groups::BOTH : Groups::OWN);
        report("prediction", both.prediction, reference.prediction, limits.guided);
        if (!both.variance.empty()) {
            if (reference.variance.empty())
                throw BundleError("the reference has no variance, but the denoiser gives one");
            report("variance", both.variance, reference.variance, limits.guided);
        }
        if (step != 0 && step != steps / 2 && step != steps - 1) continue;
        if (guided) report("unguided", denoise(Groups::OWN).prediction, reference.conditional, limits.prediction);
        if (reference.negative.rows && !reference.null.empty())
            report("null condition", denoise(Groups::NULLS).prediction, reference.null, limits.prediction);
    }
}

// The largest absolute difference; NaN where a number of them is.
double difference(const float* values, const float* others, std::size_t size) {
    double most = 0;
    for (std::size_t i = 0; i < size && !std::isnan(most); ++i) {
        const double gap = std::abs(static_cast<double>(values[i]) - others[i]);
        if (!(gap <= most)) most = gap;
    }
    return most;
}

Figure invariance(const Pipeline& pipe, const Stage& stage, double difference, const std::string& where) {
    const double limit = pipe.on_cpu(stage) ? 0 : std::numeric_limits<double>::infinity();
    return {stage.name, INVARIANCE, difference, limit, false, {}, where};
}

// Appends what the step reads of one sample, [G, 1, ...], to that of others, [G, B, ...].
void put_beside(Arrays& all, const Arrays& sample) {
    for (const auto& [name, tensor] : sample) {
        Tensor& joined = all[name];
        if (joined.shape.empty()) {
            joined = tensor;
            continue;
        }
        const auto groups = static_cast<std::size_t>(tensor.shape[0]), row = count(tensor.shape) / groups;
        const auto before = static_cast<std::size_t>(joined.shape[1]++) * row;
        const auto join = [&](auto& to, const auto& from) {
            auto values = to;
            values.clear();
            for (std::size_t group = 0; group < groups && !from.empty(); ++group) {
                const auto old = to.begin() + static_cast<std::ptrdiff_t>(group * before);
                const auto own = from.begin() + static_cast<std::ptrdiff_t>(group * row);
                values.insert(values.end(), old, old + static_cast<std::ptrdiff_t>(before));
                values.insert(values.end(), own, own + static_cast<std::ptrdiff_t>(row));
            }
            to = std::move(values);
        };
        join(joined.floats, tensor.floats);
        join(joined.integers, tensor.integers);
    }
}

// Asks for a row alone and between two others, each with its own timestep, condition and guidance. What the row reads
// from the stages before the loop is made for it alone, too.
void check_step_row(Pipeline& pipe, const Reference& reference, const OnFigure& on_figure) {
    const Stage& stage = pipe.manifest.step();
    const std::size_t last = reference.timesteps.size() - 1, samples = reference.batch();
    const std::size_t each = count(pipe.manifest.state().shape);
    std::vector<std::pair<std::size_t, std::size_t>> places = {// sample and step
                                                               {0, 0},
                                                               {1 % samples, (last + 1) / 2},
                                                               {0, last}};
    places.resize(std::min(places.size(), static_cast<std::size_t>(stage.max_batch)));
    const std::size_t row = places.size() / 2, sample = places[row].first;
    Array times;
    std::vector<float> states, weights;
    for (const auto& [own, step] : places) {
        times.push_back(reference.timesteps[step]);
        const auto state = reference.latents.begin() + static_cast<std::ptrdiff_t>((step * samples + own) * each);
        states.insert(states.end(), state, state + static_cast<std::ptrdiff_t>(each));
        weights.push_back(reference.guidance[own]);
    }
    const Rows away = pipe.manifest.mixes_guidance() ? reference.negative : Rows();
    Memo whole = pipe.memo(times, reference.condition, away);
    Arrays mixed;
    for (std::size_t step = 0; step < places.size(); ++step)
        put_beside(mixed, whole(step, places[step].first, places[step].first + 1));
    Memo own = pipe.memo({times[row]}, slice(reference.condition, sample, sample + 1), away);
    const Arrays alone = own(0, 0, 1);
    const Prediction batch =
        pipe.denoise(states, [&](std::size_t, std::size_t) -> const Arrays& { return mixed; }, weights);
    const auto state = states.begin() + static_cast<std::ptrdiff_t>(row * each);
    const Prediction single =
        pipe.denoise({state, state + static_cast<std::ptrdiff_t>(each)},
                     [&](std::size_t, std::size_t) -> const Arrays& { return alone; }, {weights[row]});
    double most = difference(&batch.prediction[row * each], single.prediction.data(), each);
    if (!single.variance.empty() && !std::isnan(most)) {
        const double gap = difference(&batch.variance[row * each], single.variance.data(), each);
        if (!(gap <= most)) most = gap;
    }
    on_figure(invariance(pipe, stage, most,
                         text("sample ", sample, " at t = ", times[row], " in a batch of ", places.size())));
}

// Decodes a sample of the reference alone and in a batch with the others.
void check_end_row(Pipeline& pipe, const Reference& reference, const OnFigure& on_figure) {
    const Stage& stage = *pipe.manifest.end();
    const std::size_t each = count(pipe.manifest.state().shape), pixels = count(pipe.manifest.image_shape());
    const std::size_t batch = std::min(reference.batch(), static_cast<std::size_t>(stage.max_batch));
    const std::size_t sample = batch / 2;
    const float* const latents = &reference.latents[reference.timesteps.size() * reference.batch() * each];
    try {
        const std::vector<float> together = pipe.decode({latents, latents + batch * each});
        const std::vector<float> alone = pipe.decode({latents + sample * each, latents + (sample + 1) * each});
        on_figure(invariance(pipe, stage, difference(&together[sample * pixels], alone.data(), pixels),
                             text("sample ", sample, " in a batch of ", batch)));
    } catch (const EngineError& error) {
        on_figure(invariance(pipe, stage, std::nan(""), error.what()));
    }
}

// The relative error of all samples together, or of the nearest one; NaN where one sample's is.
double drift(const Array& latents, const float* reference, std::size_t samples, bool nearest) {
    const std::size_t parts = nearest ? samples : 1, each = latents.size() / parts;
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t part = 0; part < parts; ++part) {
        const auto begin = latents.begin() + static_cast<std::ptrdiff_t>(part * each);
        const double error =
            relative_error({begin, begin + static_cast<std::ptrdiff_t>(each)}, &reference[part * each]);
        if (std::isnan(error)) return error;
        least = std::min(least, error);
    }
    return least;
}

// The whole loop from the same noise, its latents compared after every step; the last, empty where an engine failed.
std::vector<float> free_run(Pipeline& pipe, const Reference& reference, const Tolerances& limits,
                            const OnFigure& on_figure) {
    const char* const metric = "latents, rel-L2";
    std::size_t next = 1;
    const std::size_t steps = reference.timesteps.size();
    const std::size_t each = reference.batch() * count(pipe.manifest.state().shape);
    Request request;
    request.condition = reference.condition.arrays;
    request.condition.erase(pipe.manifest.guidance.port);  // filled by the weights, as in every request
    // The manifest's constants are part of what is verified; a mask goes with its port.
    for (const Port& port : pipe.manifest.conditions())
        if (pipe.manifest.mixes_guidance() && !pipe.manifest.null.count(port.masks.empty() ? port.name : port.masks))
            request.negative[port.name] = reference.negative.arrays.at(port.name);
    request.count = reference.batch();
    request.steps = static_cast<std::int64_t>(steps) / evaluations(pipe.manifest.process.sampler.solver);
    request.guidance = reference.guidance;
    request.seeds.assign(reference.seeds.begin(), reference.seeds.end());
    request.on_step = [&](int done, int, const Array& latents) {
        count_steps(1);
        const float* expected = &reference.latents[static_cast<std::size_t>(done) * each];
        const double error = drift(latents, expected, reference.batch(), limits.nearest);
        on_figure({"run", metric, error, limits.latents, false, next++, text("after step ", done, " of ", steps)});
        return false;
    };
    try {
        return pipe.latents(request);
    } catch (const EngineError& error) {
        on_figure({"run", metric, std::nan(""), limits.latents, false, next, error.what()});
        return {};
    }
}

void check_pictures(Pipeline& pipe, const Reference& reference, const std::vector<float>& latents, double limit,
                    bool nearest, const OnFigure& on_figure) {
    const std::size_t batch = reference.batch(), numbers = reference.images.size() / batch;
    std::vector<std::uint8_t> pictures;
    try {
        pictures = reference.shown(pipe.pictures(latents), pipe.manifest.image_shape());
    } catch (const EngineError& error) {
        return on_figure({"run", "pictures, PSNR in dB", std::nan(""), limit, true, {}, error.what()});
    }
    double chosen = 0, flattest = std::numeric_limits<double>::infinity();
    std::size_t shown = 0, flat = 0;
    for (std::size_t sample = 0; sample < batch; ++sample) {
        const std::uint8_t* picture = &pictures[sample * numbers];
        const double ratio = psnr(picture, &reference.images[sample * numbers], numbers);
        if (!sample || (nearest ? ratio > chosen : ratio < chosen)) chosen = ratio, shown = sample;
        double sum = 0, squares = 0;
        for (std::size_t i = 0; i < numbers; ++i) sum += picture[i], squares += double{1} * picture[i] * picture[i];
        const double mean = sum / static_cast<double>(numbers);
        const double contrast = std::sqrt(std::max(squares / static_cast<double>(numbers) - mean * mean, 0.0));
        if (contrast < flattest) flattest = contrast, flat = sample;
    }
    on_figure({"run", "pictures, PSNR in dB", chosen, limit, true, {}, text("sample ", shown)});
    on_figure({"run", "pictures, contrast", flattest, CONTRAST, true, {}, text("sample ", flat)});
}

void verify_size(Pipeline& pipe, bool prompts, const OnFigure& on_figure) {
    const Reference reference = load_reference(pipe);
    const Manifest& manifest = pipe.manifest;
    const Process& process = manifest.process;
    double conditioner = 0;  // the widest limit of a stage before the loop
    for (const Stage& stage : manifest.stages) {
        if (!TOLERANCES.count(stage.precision))
            throw BundleError(
                text(stage.name, " has precision '", stage.precision, "', for which this library has no limits"));
        if (stage.before_loop()) conditioner = std::max(conditioner, TOLERANCES.at(stage.precision).conditioner);
    }
    if (prompts) count_steps(0, 2 * reference.timesteps.size() * (1 + manifest.sizes.size()));
    if (prompts) check_prompts(pipe, on_figure);
    const Array betas = process.betas();
    const std::vector<std::size_t> wrong = differences(betas, reference.betas);
    on_figure({"sampler",
               "betas that differ",
               static_cast<double>(wrong.size()),
               0,
               false,
               {},
               wrong.empty() ? "" : text("first at t = ", wrong[0])});
    const std::size_t steps = reference.timesteps.size();
    const std::string& solver = process.sampler.solver;
    const Array times = plan(process, solver, static_cast<std::int64_t>(steps) / evaluations(solver));
    on_figure(
        {"sampler", "timesteps that differ", static_cast<double>(differences(times, reference.timesteps).size()), 0});
    const std::vector<std::uint64_t> seeds(reference.seeds.begin(), reference.seeds.end());
    const std::size_t each = reference.latents.size() / (steps + 1);
    const std::vector<float> noise = draw(seeds, reference.batch())(each);
    const double apart = difference(noise.data(), reference.latents.data(), each);
    on_figure({"sampler", "noise, max abs error", apart, NOISE_ATOL});
    const Tolerances& denoiser = TOLERANCES.at(manifest.step().precision);
    if (conditioner > 0) check_before_loop(pipe, reference, conditioner, on_figure);
    check_encoder(pipe, reference, on_figure);
    teacher_forced(pipe, reference, denoiser, on_figure);
    check_step_row(pipe, reference, on_figure);
    const std::vector<float> latents = free_run(pipe, reference, denoiser, on_figure);
    if (!latents.empty() && manifest.end()) {
        const double least = std::min(denoiser.pictures, TOLERANCES.at(manifest.end()->precision).pictures);
        check_pictures(pipe, reference, latents, least, denoiser.nearest, on_figure);
    }
    if (manifest.end()) check_end_row(pipe, reference, on_figure);
}

}  // namespace

void verify(Pipeline& pipe, const OnFigure& on_figure) {
    verify_size(pipe, true, on_figure);
    for (const Manifest& other : pipe.manifest.sizes) {
        pipe.close();
        verify_size(pipe.at(other.size), false, [&](Figure figure) {
            figure.stage = other.size + ": " + figure.stage;
            on_figure(figure);
        });
    }
}

}  // namespace dit_runtime
