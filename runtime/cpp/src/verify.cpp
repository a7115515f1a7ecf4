#include "verify.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "errors.hpp"
#include "facts.hpp"
#include "images.hpp"
#include "reference.hpp"
#include "replay.hpp"

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
