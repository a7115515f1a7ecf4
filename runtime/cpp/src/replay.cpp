#include "replay.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "call.hpp"
#include "errors.hpp"

namespace dit_runtime {
namespace {

const char* const INVARIANCE = "a row in a batch and alone, max abs difference";

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

}  // namespace

void count_steps(std::size_t steps, std::size_t expected) {
    const auto& progress = current_call().progress;
    if (!progress || progress->of_bytes) return;
    progress->expect(expected);
    progress->add(steps);
}

double relative_error(const std::vector<float>& value, const float* reference) {
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < value.size(); ++i) {
        const double expected = reference[i], gap = value[i] - expected;
        difference += gap * gap;
        norm += expected * expected;
    }
    return std::sqrt(difference) / std::max(std::sqrt(norm), 1e-30);
}

double difference(const float* values, const float* others, std::size_t size) {
    double most = 0;
    for (std::size_t i = 0; i < size && !std::isnan(most); ++i) {
        const double gap = std::abs(static_cast<double>(values[i]) - others[i]);
        if (!(gap <= most)) most = gap;
    }
    return most;
}

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

}  // namespace dit_runtime
