#include "verify.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "errors.hpp"
#include "images.hpp"

namespace dit_runtime {
namespace {

const char* const REFERENCE = "reference.npz";
constexpr std::size_t FINGERPRINTS = 4;
constexpr std::uint64_t FINGERPRINT_SEED = 0;

// S steps of a run of B samples.
struct Reference {
    Array betas;                                       // (T,)
    Array timesteps;                                   // (S,)
    std::vector<std::int64_t> labels, seeds;           // (B,)
    std::vector<float> guidance;                       // (B,)
    std::vector<float> latents;                        // (S + 1, B, C, H, W)
    std::vector<float> prediction, conditional, null;  // (S, B, C, H, W)
    std::vector<float> variance;                       // (S, B, C, H, W), or empty where it is not learned
    std::vector<float> fingerprint;                    // (classes + 1, FINGERPRINTS)
    std::vector<std::uint8_t> images;                  // (B, 8H, 8W, 3), or empty without a decoder
};

Reference load_reference(const Pipeline& pipe) {
    const std::string folder = pipe.folder.string();
    try {
        auto arrays = parse_npz(read_bytes(inside(pipe.folder, REFERENCE)));
        std::vector<std::string> missing;
        for (const char* name : {"betas", "timesteps", "labels", "seeds", "guidance", "latents", "prediction",
                                 "conditional", "null", "variance", "fingerprint", "images"})
            if (!arrays.count(name)) missing.push_back(name);
        if (!missing.empty()) throw NpyError("it lacks " + join(missing));
        const Reference reference = {
            arrays["betas"].as<double>(),       arrays["timesteps"].as<double>(),  arrays["labels"].as<std::int64_t>(),
            arrays["seeds"].as<std::int64_t>(), arrays["guidance"].as<float>(),    arrays["latents"].as<float>(),
            arrays["prediction"].as<float>(),   arrays["conditional"].as<float>(), arrays["null"].as<float>(),
            arrays["variance"].as<float>(),     arrays["fingerprint"].as<float>(), arrays["images"].as<std::uint8_t>()};
        const std::size_t steps = reference.timesteps.size(), batch = reference.labels.size();
        const std::size_t each = batch * count(pipe.manifest.latent_shape);
        const auto expect = [](const char* name, std::size_t found, std::size_t expected) {
            if (found != expected) throw NpyError(text(name, " has ", found, " numbers, expected ", expected));
        };
        if (steps == 0 || batch == 0) throw NpyError("it has no steps or no labels");
        expect("seeds", reference.seeds.size(), batch);
        expect("guidance", reference.guidance.size(), batch);
        expect("latents", reference.latents.size(), (steps + 1) * each);
        expect("prediction", reference.prediction.size(), steps * each);
        expect("conditional", reference.conditional.size(), steps * each);
        expect("null", reference.null.size(), steps * each);
        expect("fingerprint", reference.fingerprint.size(),
               (static_cast<std::size_t>(pipe.manifest.num_classes) + 1) * FINGERPRINTS);
        if (!reference.variance.empty()) expect("variance", reference.variance.size(), steps * each);
        if (!reference.images.empty() && pipe.image_shape().empty())
            throw BundleError(folder + ": the decoder is gone, its reference has pictures");
        if (!pipe.image_shape().empty()) expect("images", reference.images.size(), batch * count(pipe.image_shape()));
        return reference;
    } catch (const NpyError& error) {
        throw BundleError(text(folder, ": ", REFERENCE, " cannot be read: ", error.what(), "; rebuild the bundle"));
    }
}

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

// Everything that leaves the loop, by timestep and label, or example caption: [N, K, D], or [N, K + M, D].
std::vector<float> hoisted(Pipeline& pipe, const std::vector<float>& times, const std::vector<std::int64_t>& numbers) {
    const std::vector<float> vectors = pipe.condition(times, numbers);
    const Shape shape = pipe.manifest.caption_shape();
    if (shape.empty()) return vectors;
    const Context read = pipe.context(examples(numbers, shape));
    std::vector<float> rows;
    for (std::size_t index = 0; index < numbers.size(); ++index)
        for (const std::vector<float>* part : {&vectors, &read.vectors}) {
            const auto size = static_cast<std::ptrdiff_t>(part->size() / numbers.size());
            const auto row = part->begin() + static_cast<std::ptrdiff_t>(index) * size;
            rows.insert(rows.end(), row, row + size);
        }
    return rows;
}

// Every label's conditioning at one timestep, projected onto a few seeded random directions.
std::vector<float> fingerprint(Pipeline& pipe, double timestep) {
    const bool captioned = !pipe.manifest.caption_shape().empty();
    const std::size_t row =
        count(pipe.manifest.conditioning_shape()) + (captioned ? count(pipe.manifest.context_shape()) : 0);
    const std::int64_t classes = pipe.manifest.num_classes;
    const std::int64_t max_rows = pipe.manifest.graphs.at("conditioner").max_batch;
    const std::vector<float> directions = Noise(FINGERPRINT_SEED).normal(row * FINGERPRINTS);
    std::vector<float> rows;
    for (std::int64_t first = 0; first <= classes; first += max_rows) {
        std::vector<std::int64_t> labels;
        for (std::int64_t label = first; label < std::min(first + max_rows, classes + 1); ++label)
            labels.push_back(label);
        const std::vector<float> times(labels.size(), static_cast<float>(timestep));
        const std::vector<float> vectors = hoisted(pipe, times, labels);
        for (std::size_t index = 0; index < labels.size() * FINGERPRINTS; ++index) {
            const float* vector = &vectors[index / FINGERPRINTS * row];
            double sum = 0;
            for (std::size_t i = 0; i < row; ++i)
                sum += static_cast<double>(vector[i]) * directions[i * FINGERPRINTS + index % FINGERPRINTS];
            rows.push_back(static_cast<float>(sum / std::sqrt(static_cast<double>(row))));
        }
    }
    return rows;
}

void check_conditioner(Pipeline& pipe, const Reference& reference, double limit, const OnCheck& on_check) {
    const double middle = reference.timesteps[reference.timesteps.size() / 2];
    const std::vector<float> found = fingerprint(pipe, middle);
    double worst = -1;
    std::size_t where = 0;
    for (std::size_t label = 0; label * FINGERPRINTS < found.size(); ++label) {
        const auto row = found.begin() + static_cast<std::ptrdiff_t>(label * FINGERPRINTS);
        const double error = relative_error({row, row + FINGERPRINTS}, &reference.fingerprint[label * FINGERPRINTS]);
        if (std::isnan(worst) || error <= worst) continue;
        worst = error, where = label;
    }
    on_check({"conditioner, rel-L2", worst, limit, false, text("label ", where)});
}

// Per step the engine is asked the same question as PyTorch was: its error is the engine's own.
void teacher_forced(Pipeline& pipe, const Reference& reference, const Tolerances& limits, const OnCheck& on_check) {
    const std::size_t steps = reference.timesteps.size(), batch = reference.labels.size();
    const std::size_t each = batch * count(pipe.manifest.latent_shape);
    Table guided = pipe.table(reference.timesteps, reference.labels, true);
    const std::vector<std::int64_t> null_labels(batch, pipe.manifest.null_label());
    Table nulls = pipe.table(reference.timesteps, null_labels, false);
    Contexts contexts = pipe.examples(reference.labels, true), own_contexts = pipe.examples(reference.labels, false),
             null_contexts = pipe.examples(null_labels, false);
    for (std::size_t step = 0; step < steps; ++step) {
        const std::string where = text("step ", step + 1, " of ", steps, ", t = ", reference.timesteps[step]);
        const float* given = &reference.latents[step * each];
        const std::vector<float> latents(given, given + each);
        const auto rows = [&](std::size_t first, std::size_t last) { return guided(step, first, last); };
        const Prediction both = pipe.denoise(latents, rows, reference.guidance, contexts);
        on_check({"prediction, rel-L2", relative_error(both.prediction, &reference.prediction[step * each]),
                  limits.guided, false, where});
        if (!both.variance.empty()) {
            if (reference.variance.empty())
                throw BundleError("the reference has no variance, but the denoiser gives one");
            on_check({"variance, rel-L2", relative_error(both.variance, &reference.variance[step * each]),
                      limits.guided, false, where});
        }
        if (step != 0 && step != steps / 2 && step != steps - 1) continue;
        const auto own = [&](std::size_t first, std::size_t last) {
            std::vector<float> both_groups = guided(step, first, last);
            both_groups.resize(both_groups.size() / 2);
            return both_groups;
        };
        const Prediction alone = pipe.denoise(latents, own, reference.guidance, own_contexts);
        on_check({"unguided, rel-L2", relative_error(alone.prediction, &reference.conditional[step * each]),
                  limits.prediction, false, where});
        const auto null_rows = [&](std::size_t first, std::size_t last) { return nulls(step, first, last); };
        const Prediction null = pipe.denoise(latents, null_rows, reference.guidance, null_contexts);
        on_check({"null label, rel-L2", relative_error(null.prediction, &reference.null[step * each]),
                  limits.prediction, false, where});
    }
}

// The whole loop from the same noise, its latents compared after every step; the last, empty where an engine failed.
std::vector<float> free_run(Pipeline& pipe, const Reference& reference, double limit, const OnCheck& on_check) {
    const char* const name = "free run, rel-L2";
    const std::size_t steps = reference.timesteps.size(), batch = reference.labels.size();
    const std::size_t each = batch * count(pipe.manifest.latent_shape);
    Request request;
    request.labels = reference.labels;
    request.steps = static_cast<std::int64_t>(steps) / evaluations(pipe.manifest.diffusion.sampler.solver);
    request.guidance = reference.guidance;
    request.seeds.assign(reference.seeds.begin(), reference.seeds.end());
    request.on_step = [&](int done, int, const Array& latents) {
        const float* expected = &reference.latents[static_cast<std::size_t>(done) * each];
        const double drift = relative_error({latents.begin(), latents.end()}, expected);
        on_check({name, drift, limit, false, text("after step ", done, " of ", steps)});
        return false;
    };
    try {
        return pipe.latents(request);
    } catch (const EngineError& error) {
        on_check({name, std::nan(""), limit, false, error.what()});
        return {};
    }
}

void check_pictures(Pipeline& pipe, const Reference& reference, const std::vector<float>& latents, double limit,
                    const OnCheck& on_check) {
    const std::size_t batch = reference.labels.size(), one = count(pipe.image_shape());
    std::vector<std::uint8_t> pictures;
    try {
        Shape shape = pipe.image_shape();
        shape.insert(shape.begin(), static_cast<std::int64_t>(batch));
        pictures = to_uint8(pipe.decode(latents), shape);
    } catch (const EngineError& error) {
        return on_check({"pictures, PSNR in dB", std::nan(""), limit, true, error.what()});
    }
    double least = std::numeric_limits<double>::infinity(), flattest = least;
    std::size_t worst = 0, flat = 0;
    for (std::size_t sample = 0; sample < batch; ++sample) {
        const std::uint8_t* picture = &pictures[sample * one];
        const double ratio = psnr(picture, &reference.images[sample * one], one);
        if (ratio < least) least = ratio, worst = sample;
        double sum = 0, squares = 0;
        for (std::size_t i = 0; i < one; ++i) sum += picture[i], squares += double{1} * picture[i] * picture[i];
        const double mean = sum / static_cast<double>(one);
        const double contrast = std::sqrt(std::max(squares / static_cast<double>(one) - mean * mean, 0.0));
        if (contrast < flattest) flattest = contrast, flat = sample;
    }
    on_check({"pictures, PSNR in dB", least, limit, true, text("sample ", worst)});
    on_check({"pictures, contrast", flattest, 1.0, true, text("sample ", flat)});
}

}  // namespace

void verify(Pipeline& pipe, const OnCheck& on_check) {
    check_files(pipe.folder, pipe.manifest, {REFERENCE});
    const Reference reference = load_reference(pipe);
    const Diffusion& diffusion = pipe.manifest.diffusion;
    std::map<std::string, Tolerances> limits;
    for (const auto& [name, graph] : pipe.manifest.graphs) {
        if (!TOLERANCES.count(graph.precision))
            throw BundleError(
                text(name, " has precision '", graph.precision, "', for which this library has no limits"));
        limits[name] = TOLERANCES.at(graph.precision);
    }
    const Array betas = diffusion.betas();
    std::size_t wrong = betas.size() == reference.betas.size() ? 0 : betas.size();
    for (std::size_t t = 0; t < betas.size() && betas.size() == reference.betas.size(); ++t)
        wrong += betas[t] != reference.betas[t];
    on_check({"betas that differ", static_cast<double>(wrong), 0, false, ""});
    const std::size_t steps = reference.timesteps.size();
    const std::string& solver = diffusion.sampler.solver;
    const Array times = plan(diffusion, solver, static_cast<std::int64_t>(steps) / evaluations(solver));
    wrong = times.size() == steps ? 0 : steps;
    for (std::size_t step = 0; step < std::min(steps, times.size()); ++step)
        wrong += times[step] != reference.timesteps[step];
    on_check({"timesteps that differ", static_cast<double>(wrong), 0, false, ""});
    const std::vector<std::uint64_t> seeds(reference.seeds.begin(), reference.seeds.end());
    const std::size_t each = reference.latents.size() / (steps + 1);
    const std::vector<float> noise = draw(seeds, reference.labels.size())(each);
    double apart = 0;
    for (std::size_t i = 0; i < each && !std::isnan(apart); ++i) {
        const double gap = std::abs(static_cast<double>(noise[i]) - reference.latents[i]);
        if (!(gap <= apart)) apart = gap;
    }
    on_check({"noise, max abs error", apart, NOISE_ATOL, false, ""});
    check_conditioner(pipe, reference, limits.at("conditioner").conditioner, on_check);
    teacher_forced(pipe, reference, limits.at("denoiser"), on_check);
    const std::vector<float> latents = free_run(pipe, reference, limits.at("denoiser").latents, on_check);
    if (!latents.empty() && limits.count("decoder")) {
        const double least = std::min(limits.at("denoiser").pictures, limits.at("decoder").pictures);
        check_pictures(pipe, reference, latents, least, on_check);
    }
}

}  // namespace dit_runtime
