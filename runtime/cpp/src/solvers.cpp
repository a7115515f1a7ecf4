#include "solvers.hpp"

#include <algorithm>
#include <cmath>
#include <deque>

#include "errors.hpp"

namespace dit_runtime {
namespace {

struct Denoised {
    Array x0, epsilon;
};

// x₀ and ε from what the network predicts: x = α x₀ + σ ε, v = α ε - σ x₀ (Salimans & Ho 2022).
Denoised denoised(const Diffusion& diffusion, const Array& x, const std::vector<float>& prediction, double level) {
    const double alpha = std::sqrt(level), sigma = std::sqrt(1 - level);
    Array x0(x.size()), epsilon(prediction.begin(), prediction.end());
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double output = epsilon[i];
        if (diffusion.prediction == "epsilon") {
            x0[i] = (x[i] - sigma * output) / alpha;
        } else if (diffusion.prediction == "sample") {
            x0[i] = output;
            epsilon[i] = (x[i] - alpha * output) / sigma;
        } else {
            x0[i] = alpha * x[i] - sigma * output;
            epsilon[i] = alpha * output + sigma * x[i];
        }
    }
    return {std::move(x0), std::move(epsilon)};
}

void clip(const Diffusion& diffusion, Array& x0) {
    const double bound = diffusion.sampler.clip_sample_range;
    if (diffusion.sampler.clip_sample)
        for (double& value : x0) value = std::clamp(value, -bound, bound);
}

// σ of a DDPM step, Nichol & Dhariwal 2021 (arXiv 2102.09672), equations 9, 10 and 15; one number, or one a value.
//
// fixed_large: β;  fixed_small: β̃ = (1 - ᾱ') / (1 - ᾱ) β;  learned_range: log σ² = f log β + (1 - f) log β̃,
// f = (v + 1) / 2.
Array deviation(const std::string& kind, const std::vector<float>& variance, double level, double after) {
    const double large = 1 - level / after;
    const double small = std::max((1 - after) / (1 - level) * large, 1e-20);
    if (kind == "fixed_small") return {std::sqrt(small)};
    if (kind == "fixed_large") return {std::sqrt(large)};
    if (variance.empty())
        throw UsageError(text("ddpm with '", kind,
                              "' variance needs a model that predicts its variance, and this one does not; take ddim"));
    Array values(variance.begin(), variance.end());
    for (double& value : values) {
        if (kind == "learned") {
            value = std::sqrt(value);
            continue;
        }
        const double part = (value + 1) / 2;
        value = std::exp(0.5 * (part * std::log(large) + (1 - part) * std::log(small)));
    }
    return values;
}

}  // namespace

Array plan(const Diffusion& diffusion, const std::string& solver, std::int64_t steps, const std::string& spacing) {
    if (!contains(FLOW_SOLVERS, solver)) {
        const auto chosen = timesteps(diffusion, solver, steps, spacing);
        return {chosen.begin(), chosen.end()};
    }
    const Array times = flow_times(diffusion, solver, steps, spacing);
    if (evaluations(solver) == 1) return {times.begin(), times.end() - 1};
    Array asked;
    for (std::size_t index = 0; index + 1 < times.size(); ++index)
        asked.insert(asked.end(), {times[index], times[index + 1]});
    return asked;
}

Array flow_times(const Diffusion& diffusion, const std::string& solver, std::int64_t steps,
                 const std::string& spacing) {
    require_fit(diffusion, solver);
    require_steps(diffusion, steps);
    if (!spacing.empty())
        throw UsageError(text("spacing is '", spacing, "' with solver ", solver, "; its steps are even"));
    if (solver == "sde" && steps < 2)
        throw UsageError(text("steps is ", steps, " with solver ", solver,
                              "; expected at least 2, for its last is one of ", LAST_STEP));
    Array times;
    for (std::int64_t index = 0; index < steps; ++index) {
        const double at = static_cast<double>(index);
        times.push_back(solver == "sde" ? at / static_cast<double>(steps - 1) * (1 - LAST_STEP)
                                        : at / static_cast<double>(steps));
    }
    times.push_back(1);
    return times;
}

Array solve(const Diffusion& diffusion, const std::string& solver, std::int64_t steps, Array x, const Draw& draw,
            const Denoise& denoise, double eta, const std::string& spacing) {
    if (!(0 <= eta && eta <= 1))
        throw UsageError(text("eta is ", eta, "; expected a number from 0 (deterministic) to 1"));
    if (eta != 0 && solver != "ddim")
        throw UsageError(text("eta is ", eta, " with solver ", solver, "; only ddim takes it"));
    if (contains(FLOW_SOLVERS, solver)) {
        const Array times = flow_times(diffusion, solver, steps, spacing);
        if (solver == "sde") return sde(times, std::move(x), draw, denoise);
        return (solver == "euler" ? euler : heun)(times, std::move(x), denoise);
    }
    const Schedule schedule = make_schedule(diffusion, solver, steps, spacing);
    if (solver == "ddpm") return ddpm(diffusion, schedule, std::move(x), draw, denoise);
    if (solver == "ddim") return ddim(diffusion, schedule, std::move(x), draw, denoise, eta);
    return dpm(diffusion, schedule, std::move(x), denoise, ORDERS.at(solver));
}

Array ddpm(const Diffusion& diffusion, const Schedule& schedule, Array x, const Draw& draw, const Denoise& denoise) {
    for (std::size_t index = 0; index < schedule.timesteps.size(); ++index) {
        const std::int64_t t = schedule.timesteps[index];
        const double level = schedule.alpha_bar[index], after = schedule.alpha_bar_prev[index];
        const auto [prediction, variance] = denoise(x, static_cast<double>(t));
        Array x0 = denoised(diffusion, x, prediction, level).x0;
        clip(diffusion, x0);
        const double alpha = level / after;
        const double own = std::sqrt(after) * (1 - alpha) / (1 - level);
        const double kept = std::sqrt(alpha) * (1 - after) / (1 - level);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = own * x0[i] + kept * x[i];
        if (t > 0) {
            const Array sigma = deviation(diffusion.sampler.variance, variance, level, after);
            const std::vector<float> z = draw(x.size());
            for (std::size_t i = 0; i < x.size(); ++i)
                x[i] = x[i] + sigma[sigma.size() == 1 ? 0 : i] * static_cast<double>(z[i]);
        }
    }
    return x;
}

Array ddim(const Diffusion& diffusion, const Schedule& schedule, Array x, const Draw& draw, const Denoise& denoise,
           double eta) {
    for (std::size_t index = 0; index < schedule.timesteps.size(); ++index) {
        const double level = schedule.alpha_bar[index], after = schedule.alpha_bar_prev[index];
        const Prediction output = denoise(x, static_cast<double>(schedule.timesteps[index]));
        auto [x0, epsilon] = denoised(diffusion, x, output.prediction, level);
        clip(diffusion, x0);
        const double sigma = eta * std::sqrt((1 - after) / (1 - level) * (1 - level / after));
        const double own = std::sqrt(after), noise = std::sqrt(1 - after - sigma * sigma);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = own * x0[i] + noise * epsilon[i];
        if (sigma > 0) {
            const std::vector<float> z = draw(x.size());
            for (std::size_t i = 0; i < x.size(); ++i) x[i] = x[i] + sigma * static_cast<double>(z[i]);
        }
    }
    return x;
}

Array dpm(const Diffusion& diffusion, const Schedule& schedule, Array x, const Denoise& denoise, int order) {
    const Sampler& sampler = diffusion.sampler;
    const std::size_t count = schedule.timesteps.size();
    const bool few = sampler.lower_order_final && count < 15;
    std::deque<Array> data;  // predicted x₀, newest first
    std::deque<double> lambdas;
    for (std::size_t index = 0; index < count; ++index) {
        const double level = schedule.alpha_bar[index], after = schedule.alpha_bar_prev[index];
        const Prediction output = denoise(x, static_cast<double>(schedule.timesteps[index]));
        data.push_front(denoised(diffusion, x, output.prediction, level).x0);
        lambdas.push_front(log_snr(level));
        if (data.size() > static_cast<std::size_t>(order)) data.pop_back(), lambdas.pop_back();
        std::size_t now = data.size();
        if (index == count - 1 && (few || sampler.euler_at_final || after == 1 || after == level))
            now = 1;
        else if (index + 2 == count && few)
            now = std::min<std::size_t>(now, 2);
        const double h = log_snr(after) - lambdas[0];
        const double phi1 = -std::expm1(-h), phi2 = 1 - phi1 / h;
        const double kept = std::sqrt((1 - after) / (1 - level)), own = std::sqrt(after);
        const double weight = sampler.solver_type == "midpoint" ? phi1 / 2 : phi2;
        for (std::size_t i = 0; i < x.size(); ++i) {
            double step = phi1 * data[0][i];
            const double first = now > 1 ? (data[0][i] - data[1][i]) * (h / (lambdas[0] - lambdas[1])) : 0;
            if (now == 2) step = step + weight * first;
            if (now == 3) {
                const double second = (data[1][i] - data[2][i]) * (h / (lambdas[1] - lambdas[2]));
                const double bend = (first - second) * (h / (lambdas[0] - lambdas[2]));
                const double slope = first + bend * ((lambdas[0] - lambdas[1]) / h);
                step = step + phi2 * slope + (0.5 - phi2 / h) * bend;
            }
            x[i] = kept * x[i] + own * step;
        }
    }
    return x;
}

Array euler(const Array& times, Array x, const Denoise& denoise) {
    for (std::size_t index = 0; index + 1 < times.size(); ++index) {
        const double step = times[index + 1] - times[index];
        const Prediction velocity = denoise(x, times[index]);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = x[i] + step * static_cast<double>(velocity.prediction[i]);
    }
    return x;
}

Array heun(const Array& times, Array x, const Denoise& denoise) {
    for (std::size_t index = 0; index + 1 < times.size(); ++index) {
        const double step = times[index + 1] - times[index];
        const Prediction velocity = denoise(x, times[index]);
        const Array first(velocity.prediction.begin(), velocity.prediction.end());
        Array ahead(x.size());
        for (std::size_t i = 0; i < x.size(); ++i) ahead[i] = x[i] + step * first[i];
        const Prediction second = denoise(ahead, times[index + 1]);
        for (std::size_t i = 0; i < x.size(); ++i)
            x[i] = x[i] + step / 2 * (first[i] + static_cast<double>(second.prediction[i]));
    }
    return x;
}

Array sde(const Array& times, Array x, const Draw& draw, const Denoise& denoise) {
    for (std::size_t index = 0; index + 1 < times.size(); ++index) {
        const double t = times[index], after = times[index + 1];
        const Prediction velocity = denoise(x, t);
        for (std::size_t i = 0; i < x.size(); ++i)
            x[i] = x[i] + (after - t) * ((1 + t) * static_cast<double>(velocity.prediction[i]) - x[i]);
        if (after < 1) {
            const double deviation = std::sqrt(2 * (1 - t) * (after - t));
            const std::vector<float> z = draw(x.size());
            for (std::size_t i = 0; i < x.size(); ++i) x[i] = x[i] + deviation * static_cast<double>(z[i]);
        }
    }
    return x;
}

}  // namespace dit_runtime
