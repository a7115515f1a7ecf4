#include "schedule.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>

#include "curves.hpp"
#include "errors.hpp"
#include "facts.hpp"

namespace dit_runtime {

const std::vector<std::string> MULTISTEP = multistep_solvers();
const double FIRST_ANGLE = constant("scm_first_angle"), SECOND_ANGLE = constant("scm_second_angle");
const double LAST_STEP = constant("sde_last_step"), LARGEST = constant("largest_sigma");

namespace {

const std::vector<std::string> NEEDS_SIGNAL = {"unipc", "deis"};
const std::vector<std::string> CLIPPED = {"dpm++", "sde-dpm++"};  // the methods that keep to lambda_min_clipped

std::string default_spacing(const Sampler& sampler, const std::string& solver) {
    if (contains(MULTISTEP, solver)) return sampler.dpm_spacing;
    return solver == "ddpm" ? sampler.ddpm_spacing : sampler.ddim_spacing;
}

std::int64_t count_unclipped(const Process& process) {
    const auto& floor = process.sampler.lambda_min_clipped;
    if (!floor) return process.train_steps;
    const Array levels = process.alpha_bar();
    return std::count_if(levels.begin(), levels.end(),
                         [&](double level) { return 0.5 * std::log(level / (1 - level)) >= *floor; });
}

// The smallest integer stride that visits exactly `steps` of the training steps.
std::int64_t find_stride(std::int64_t total, std::int64_t steps) {
    std::int64_t smallest = 0;
    std::vector<std::int64_t> counts;  // in the order of growing count
    for (std::int64_t stride = total - 1; stride > 0; --stride) {
        const std::int64_t count = (total + stride - 1) / stride;
        if (counts.empty() || counts.back() != count) counts.push_back(count);
        if (count == steps) smallest = stride;
    }
    if (smallest) return smallest;
    std::stable_sort(counts.begin(), counts.end(),
                     [steps](std::int64_t a, std::int64_t b) { return std::abs(a - steps) < std::abs(b - steps); });
    counts.resize(std::min<std::size_t>(counts.size(), 2));
    std::sort(counts.begin(), counts.end());
    std::string near;
    for (const auto count : counts) near += (near.empty() ? "" : " and ") + std::to_string(count);
    throw UsageError(text(steps, " steps have no integer stride in ", total,
                          " training steps; the nearest that do: ", near, " (or take spacing 'respaced')"));
}

void require_count(const Array& times, std::int64_t steps) {
    if (times.size() != static_cast<std::size_t>(steps))
        throw UsageError(text("steps is ", steps, "; expected ", times.size(), ", for spacing lists so many times"));
}

// The spacing that gives a flow's σ, or the ends of its curve, and the curve.
std::pair<std::string, std::string> base_and_curve(const Process& process, const std::string& solver,
                                                   const std::string& spacing) {
    const Sampler& sampler = process.sampler;
    if (spacing.empty()) return {sampler.flow_spacing, sampler.flow_curve};
    if (!listed(spacing).empty()) return {sampler.flow_spacing, "none"};
    if (!contains(FLOW_SPACINGS, spacing))
        throw UsageError(
            text("spacing is '", spacing, "' with solver ", solver, "; take one of ", join(FLOW_SPACINGS)));
    if (contains(CURVES, spacing)) return {sampler.flow_spacing, spacing};
    return {spacing, "none"};
}

Array even_points(const Process& process, const std::string& solver, std::int64_t steps, const std::string& asked) {
    const std::string spacing = base_and_curve(process, solver, asked).first;
    if (spacing == "linspace") return linspace(1, process.sigma_min, steps);
    Array points;
    if (spacing == "discrete") {  // in diffusers' order of operations: ⌊T σ⌋ depends on the last bit
        points = linspace(1, 1 / static_cast<double>(process.train_steps), steps + 1);
        if (multistep_method(solver) == "unipc") {
            points.pop_back();
            return points;
        }
        for (double& point : points) point = 1 - point;
        std::reverse(points.begin(), points.end());
        points.pop_back();
        return points;
    }
    if (spacing == "integer") {
        const double total = static_cast<double>(process.train_steps);
        points = linspace(total, 1, steps);
        for (double& point : points) point = std::floor(point) / total;
        return points;
    }
    for (std::int64_t index = 0; index < steps; ++index)
        points.push_back(1 - static_cast<double>(index) / static_cast<double>(steps));
    return points;
}

Array sde_points(std::int64_t steps, const std::string& spacing) {
    if (!spacing.empty())
        throw UsageError(
            text("spacing is '", spacing, "' with solver sde; its steps are even, and its last is ", LAST_STEP));
    if (steps < 2)
        throw UsageError(
            text("steps is ", steps, " with solver sde; expected at least 2, for its last is one of ", LAST_STEP));
    Array points;
    for (std::int64_t index = 0; index < steps; ++index)
        points.push_back(1 - static_cast<double>(index) / static_cast<double>(steps - 1) * (1 - LAST_STEP));
    return points;
}

Array scm_points(std::int64_t steps, const std::string& spacing) {
    if (!spacing.empty())
        throw UsageError(
            text("spacing is '", spacing, "' with solver scm; its angles are even from ", FIRST_ANGLE, " on"));
    Array points = linspace(FIRST_ANGLE, 0, steps + 1);
    points.pop_back();
    if (steps == 2) points[1] = SECOND_ANGLE;
    for (double& angle : points) angle = std::sin(angle) / (std::cos(angle) + std::sin(angle));
    return points;
}

// The points of solvers that take no spacing.
const std::map<std::string, Array (*)(std::int64_t, const std::string&)> OWN_POINTS = {{"sde", sde_points},
                                                                                       {"scm", scm_points}};

Array shifted_points(const Process& process, const std::string& solver, std::int64_t steps,
                     const std::string& spacing) {
    const auto own = OWN_POINTS.find(solver);
    Array points = own != OWN_POINTS.end() ? own->second(steps, spacing) : even_points(process, solver, steps, spacing);
    const double shift = process.shift_over(steps);
    for (double& sigma : points) sigma = shift * sigma / (1 + (shift - 1) * sigma);
    if (process.shift_terminal) {
        if (steps < 2)
            throw UsageError(
                text("steps is ", steps, "; expected at least 2, for shift_terminal is ", *process.shift_terminal));
        const double scale = (1 - points.back()) / (1 - *process.shift_terminal);
        for (double& sigma : points) sigma = 1 - (1 - sigma) / scale;
    }
    return points;
}

// The σ before each step: those of the list, or the shifted ones, bent; (N,).
Array final_points(const Process& process, const std::string& solver, std::int64_t steps, const std::string& spacing) {
    require_fit(process, solver);
    require_steps(process, steps);
    const bool own = OWN_POINTS.count(solver);
    Array points = own ? Array() : listed(spacing);
    if (!points.empty()) {
        require_count(points, steps);
        if (!(0 < points.back() && points.front() <= 1))
            throw UsageError(text("spacing is '", spacing, "'; expected σ of a flow, from 1 down to above 0"));
    } else {
        points = shifted_points(process, solver, steps, spacing);
        const std::string bend = own ? "none" : base_and_curve(process, solver, spacing).second;
        if (bend != "none") points = curve(bend, points.front(), points.back(), steps);
    }
    if (contains(NEEDS_SIGNAL, multistep_method(solver)))
        for (double& sigma : points) sigma = std::min(sigma, LARGEST);
    return points;
}

Array single(Array points) {
    points.push_back(0);
    for (double& point : points) point = static_cast<double>(static_cast<float>(point));
    return points;
}

// The level after a step is that of the next timestep, but for DDIM with the spacings of Lin et al.: there it is
// T // N training steps below, wherever the next timestep lies. On a curve, levels lie between those of timesteps.
std::vector<Step> noise_steps(const Process& process, const std::string& solver, std::int64_t steps,
                              const std::string& asked) {
    const Array levels = process.alpha_bar();
    const Sampler& sampler = process.sampler;
    const std::string spacing = asked.empty() ? default_spacing(sampler, solver) : asked;
    const std::vector<std::int64_t> chosen = timesteps(process, solver, steps, spacing);
    const std::string method = multistep_method(solver);
    double final = 1.0;
    if (!method.empty())  // DEIS, a polynomial in log(σ/α), never ends at σ = 0
        final = sampler.final_sigmas_type == "zero" && method != "deis" ? 1.0 : levels[0];
    else
        final = solver == "ddpm" || sampler.set_alpha_to_one ? 1.0 : levels[0];
    std::vector<std::int64_t> following(chosen.begin() + 1, chosen.end());
    following.push_back(-1);
    if (solver == "ddim" && (spacing == "leading" || spacing == "trailing" || spacing == "linspace"))
        for (std::size_t index = 0; index < chosen.size(); ++index)
            following[index] = chosen[index] - process.train_steps / steps;
    const auto level = [&](std::int64_t time) {
        const double bar = time >= 0 ? levels[static_cast<std::size_t>(time)] : final;
        return Level{static_cast<double>(time), std::sqrt(bar), std::sqrt(1 - bar)};
    };
    std::vector<Step> schedule;
    if (contains(CURVES, spacing)) {
        const Array bent = curve_ratios(process, spacing, steps);
        std::vector<Level> points;
        for (std::size_t index = 0; index < chosen.size(); ++index) {
            const double alpha = 1 / std::sqrt(1 + bent[index] * bent[index]);
            points.push_back({static_cast<double>(chosen[index]), alpha, bent[index] * alpha});
        }
        points.push_back(level(-1));
        if (final != 1 && steps > 1) {  // the same number, so that the last step is none
            points[points.size() - 2].alpha = points.back().alpha;
            points[points.size() - 2].sigma = points.back().sigma;
        }
        for (std::size_t index = 0; index + 1 < points.size(); ++index)
            schedule.push_back({points[index], points[index + 1]});
        return schedule;
    }
    for (std::size_t index = 0; index < chosen.size(); ++index)
        schedule.push_back({level(chosen[index]), level(following[index])});
    return schedule;
}

}  // namespace

double Level::log_snr() const { return sigma > 0 ? std::log(alpha / sigma) : std::numeric_limits<double>::infinity(); }

std::vector<Step> make_schedule(const Process& process, const std::string& solver, std::int64_t steps,
                                const std::string& spacing) {
    if (process.kind() == "noise") return noise_steps(process, solver, steps, spacing);
    std::vector<Step> schedule;
    const Array times = flow_times(process, solver, steps, spacing), points = sigmas(process, solver, steps, spacing);
    const auto level = [&](std::size_t index) { return Level{times[index], 1 - points[index], points[index]}; };
    for (std::size_t index = 0; index + 1 < points.size(); ++index)
        schedule.push_back({level(index), level(index + 1)});
    return schedule;
}

Array sigmas(const Process& process, const std::string& solver, std::int64_t steps, const std::string& spacing) {
    Array points = single(final_points(process, solver, steps, spacing));
    const bool falls = std::adjacent_find(points.begin(), points.end(),
                                          [](double t, double next) { return next >= t; }) == points.end();
    if (!falls && (contains(MULTISTEP, solver) || !listed(spacing).empty()))
        throw UsageError(text(steps, " steps of ", solver, ": two σ are the same in float32; take fewer"));
    return points;
}

Array flow_times(const Process& process, const std::string& solver, std::int64_t steps, const std::string& spacing) {
    Array points = final_points(process, solver, steps, spacing);
    const double total = static_cast<double>(process.train_steps);
    if (!OWN_POINTS.count(solver)) {
        const auto [base, bend] = base_and_curve(process, solver, spacing);
        if (base == "discrete")
            for (double& point : points) point = std::floor(point * total) / total;
        if (base == "integer") {
            if (bend != "none" || !listed(spacing).empty())
                throw UsageError(text("spacing is '", spacing.empty() ? bend : spacing,
                                      "'; this network reads σ before its shift, so take 'integer'"));
            points = even_points(process, solver, steps, spacing);
        }
    }
    return single(std::move(points));
}

Array listed(const std::string& spacing) {
    if (spacing.empty() || spacing[0] < '0' || spacing[0] > '9') return {};
    const auto table = nlohmann::json::parse("[" + spacing + "]", nullptr, false);
    Array times;
    bool falls = table.is_array();
    for (const auto& entry : falls ? table : nlohmann::json::array()) {
        const double time = entry.is_number() ? entry.get<double>() : std::numeric_limits<double>::quiet_NaN();
        falls = falls && std::isfinite(time) && (times.empty() || time < times.back());
        times.push_back(time);
    }
    if (!falls)
        throw UsageError(text("spacing is '", spacing, "'; expected a name, or falling times as in '999, 640, 300'"));
    return times;
}

std::vector<std::int64_t> timesteps(const Process& process, const std::string& solver, std::int64_t steps,
                                    const std::string& asked) {
    require_fit(process, solver);
    require_steps(process, steps);
    const std::int64_t total = process.train_steps;
    const Sampler& sampler = process.sampler;
    const std::string spacing = asked.empty() ? default_spacing(sampler, solver) : asked;
    if (const Array times = listed(spacing); !times.empty()) {
        require_count(times, steps);
        const bool whole = std::all_of(times.begin(), times.end(), [](double t) { return t == std::floor(t); });
        if (!whole || times.front() >= static_cast<double>(total) || times.back() < 0)
            throw UsageError(
                text("spacing is '", spacing, "'; expected training steps, from ", total - 1, " down to 0"));
        return {times.begin(), times.end()};
    }
    if (!contains(SPACINGS, spacing))
        throw UsageError(
            text("spacing '", spacing, "' is not known", nearest(spacing, SPACINGS), "; known: ", join(SPACINGS)));

    const std::string method = multistep_method(solver);
    if (contains(CURVES, spacing)) {
        Array logs = training_ratios(process);
        for (double& value : logs) value = std::log(value);
        const bool steep = process.beta_schedule == "squaredcos_cap_v2" && contains(CLIPPED, method);
        std::vector<std::int64_t> places;
        for (const double ratio : curve_ratios(process, spacing, steps)) {
            const double place = place_in(logs, std::log(ratio));
            const bool nearest_one = spacing == "karras" && !steep;
            places.push_back(static_cast<std::int64_t>(nearest_one ? std::nearbyint(place) : std::floor(place)));
        }
        return places;
    }

    const bool multistep = !method.empty();
    const std::int64_t end = contains(CLIPPED, method) ? count_unclipped(process) : total;
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

}  // namespace dit_runtime
