#include "schedule.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "errors.hpp"

namespace dit_runtime {
namespace {

const double PI = 3.141592653589793;

// As NumPy's: the last point is exact.
Array linspace(double start, double stop, std::int64_t count) {
    Array points(static_cast<std::size_t>(count));
    const double step = (stop - start) / static_cast<double>(count - 1);
    for (std::int64_t index = 0; index < count; ++index)
        points[static_cast<std::size_t>(index)] = count > 1 ? static_cast<double>(index) * step + start : start;
    if (count > 1) points.back() = stop;
    return points;
}

std::string default_spacing(const Sampler& sampler, const std::string& solver) {
    if (ORDERS.count(solver)) return sampler.dpm_spacing;
    return solver == "ddpm" ? sampler.ddpm_spacing : sampler.ddim_spacing;
}

std::int64_t count_unclipped(const Diffusion& diffusion) {
    const auto& floor = diffusion.sampler.lambda_min_clipped;
    if (!floor) return diffusion.train_steps;
    const Array levels = diffusion.alpha_bar();
    return std::count_if(levels.begin(), levels.end(), [&](double level) { return log_snr(level) >= *floor; });
}

// The smallest integer stride that visits exactly `steps` of the training steps.
std::int64_t find_stride(std::int64_t total, std::int64_t steps) {
    std::int64_t found = 0;
    std::vector<std::int64_t> counts;  // in the order of growing count
    for (std::int64_t stride = total - 1; stride > 0; --stride) {
        const std::int64_t count = (total + stride - 1) / stride;
        if (counts.empty() || counts.back() != count) counts.push_back(count);
        if (count == steps) found = stride;
    }
    if (found) return found;
    std::stable_sort(counts.begin(), counts.end(),
                     [steps](std::int64_t a, std::int64_t b) { return std::abs(a - steps) < std::abs(b - steps); });
    counts.resize(std::min<std::size_t>(counts.size(), 2));
    std::sort(counts.begin(), counts.end());
    std::string near;
    for (const auto count : counts) near += (near.empty() ? "" : " and ") + std::to_string(count);
    throw UsageError(text(steps, " steps have no integer stride in ", total,
                          " training steps; the nearest that do: ", near, " (or take spacing 'respaced')"));
}

}  // namespace

// Only + - × ÷ √ in double, cosine apart: so every machine gets the same bits. A velocity has none.
Array Diffusion::betas() const {
    if (prediction == "velocity") return {};
    if (trained_betas) return *trained_betas;
    if (beta_schedule == "linear") return linspace(beta_start, beta_end, train_steps);
    if (beta_schedule == "scaled_linear") {
        Array values = linspace(std::sqrt(beta_start), std::sqrt(beta_end), train_steps);
        for (double& value : values) value = value * value;
        return values;
    }
    const auto level = [this](std::int64_t index) {
        const double time = static_cast<double>(index) / static_cast<double>(train_steps);
        const double cosine = std::cos((time + 0.008) / 1.008 * PI / 2);
        return cosine * cosine;
    };
    Array values;
    for (std::int64_t index = 0; index < train_steps; ++index)
        values.push_back(std::min(1 - level(index + 1) / level(index), 0.999));
    return values;
}

Array Diffusion::alpha_bar() const {
    Array levels = betas();
    double product = 1;
    for (double& level : levels) level = product *= 1 - level;
    return levels;
}

std::vector<std::int64_t> timesteps(const Diffusion& diffusion, const std::string& solver, std::int64_t steps,
                                    const std::string& asked) {
    require_fit(diffusion, solver);
    require_steps(diffusion, steps);
    const std::int64_t total = diffusion.train_steps;
    const Sampler& sampler = diffusion.sampler;
    const std::string spacing = asked.empty() ? default_spacing(sampler, solver) : asked;
    if (!contains(SPACINGS, spacing))
        throw UsageError(
            text("spacing '", spacing, "' is not known", nearest(spacing, SPACINGS), "; known: ", join(SPACINGS)));

    const bool multistep = ORDERS.count(solver) > 0;
    const std::int64_t end = multistep ? count_unclipped(diffusion) : total;
    if (!end)
        throw UsageError(text("lambda_min_clipped is ", *sampler.lambda_min_clipped, ": it leaves none of the ", total,
                              " timesteps"));
    const std::int64_t points = multistep ? steps + 1 : steps;
    Array chosen;  // ascending where a spacing counts from t = 0, and turned round then
    bool ascending = true;
    if (spacing == "stride") {
        const std::int64_t stride = find_stride(total, steps);
        for (std::int64_t t = 0; t < total; t += stride) chosen.push_back(static_cast<double>(t));
    } else if (spacing == "respaced") {
        const double stride = steps > 1 ? static_cast<double>(total - 1) / static_cast<double>(steps - 1) : 1.0;
        // A running sum, not a product: where it falls on a half, rounding depends on it.
        double sum = 0;
        for (std::int64_t index = 0; index < steps; ++index, sum += stride) chosen.push_back(std::nearbyint(sum));
    } else if (spacing == "leading") {
        for (std::int64_t index = 0; index < points; ++index)
            chosen.push_back(static_cast<double>(index * (end / points) + sampler.steps_offset));
    } else if (spacing == "linspace") {
        chosen = linspace(0, static_cast<double>(end - 1), points);
        for (double& t : chosen) t = std::nearbyint(t);
    } else {
        // The rounded difference, as a floating-point range counts: ties depend on it here too.
        ascending = false;
        const double last = static_cast<double>(end);
        const double step = (last - static_cast<double>(total) / static_cast<double>(steps)) - last;
        for (std::int64_t index = 0; index < steps; ++index) {
            const double t = std::nearbyint(last + static_cast<double>(index) * step) - 1;
            if (t >= 0) chosen.push_back(t);
        }
    }
    if (ascending) std::reverse(chosen.begin(), chosen.end());
    if (chosen.size() > static_cast<std::size_t>(steps)) chosen.resize(static_cast<std::size_t>(steps));
    const bool falls = std::adjacent_find(chosen.begin(), chosen.end(),
                                          [](double t, double next) { return next >= t; }) == chosen.end();
    if (chosen.empty() || chosen.front() >= static_cast<double>(total) || !falls)
        throw UsageError(text(steps, " steps of ", solver, " with '", spacing, "' spacing do not fit into ", total,
                              " training steps; take fewer"));
    return {chosen.begin(), chosen.end()};
}

Schedule make_schedule(const Diffusion& diffusion, const std::string& solver, std::int64_t steps,
                       const std::string& asked) {
    const std::vector<std::int64_t> chosen = timesteps(diffusion, solver, steps, asked);
    const Array levels = diffusion.alpha_bar();
    const Sampler& sampler = diffusion.sampler;
    double final = 1.0;
    if (ORDERS.count(solver))
        final = sampler.final_sigmas_type == "zero" ? 1.0 : levels[0];
    else
        final = solver == "ddpm" || sampler.set_alpha_to_one ? 1.0 : levels[0];
    std::vector<std::int64_t> previous(chosen.begin() + 1, chosen.end());
    previous.push_back(-1);
    const std::string spacing = asked.empty() ? sampler.ddim_spacing : asked;
    if (solver == "ddim" && (spacing == "leading" || spacing == "trailing" || spacing == "linspace"))
        for (std::size_t index = 0; index < chosen.size(); ++index)
            previous[index] = chosen[index] - diffusion.train_steps / steps;
    Schedule schedule{chosen, {}, {}};
    for (std::size_t index = 0; index < chosen.size(); ++index) {
        schedule.alpha_bar.push_back(levels[static_cast<std::size_t>(chosen[index])]);
        schedule.alpha_bar_prev.push_back(previous[index] >= 0 ? levels[static_cast<std::size_t>(previous[index])]
                                                               : final);
    }
    return schedule;
}

void require_fit(const Diffusion& diffusion, const std::string& solver) {
    if (!contains(SOLVERS, solver))
        throw UsageError(
            text("solver '", solver, "' is not known", nearest(solver, SOLVERS), "; known: ", join(SOLVERS)));
    const auto& fit = PREDICTIONS.at(diffusion.prediction);
    if (!contains(fit, solver))
        throw UsageError(text("solver '", solver, "' does not fit a model that predicts ", diffusion.prediction,
                              "; take one of ", join(fit)));
}

void require_steps(const Diffusion& diffusion, std::int64_t steps) {
    if (!(0 < steps && steps <= diffusion.train_steps))
        throw UsageError(text("steps is ", steps, "; expected an integer from 1 to ", diffusion.train_steps,
                              ", the training steps"));
}

double log_snr(double alpha_bar) {
    return alpha_bar < 1 ? 0.5 * std::log(alpha_bar / (1 - alpha_bar)) : std::numeric_limits<double>::infinity();
}

}  // namespace dit_runtime
