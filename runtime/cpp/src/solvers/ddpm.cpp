#include <algorithm>
#include <cmath>

#include "method.hpp"

namespace dit_runtime {
namespace {

// s, Nichol & Dhariwal 2021 (arXiv 2102.09672), equations 9, 10 and 15; one number, or one a value.
//
// fixed_large: β;  fixed_small: β̃ = σ'² / σ² β;  learned_range: log s² = f log β + (1 - f) log β̃, f = (v + 1) / 2.
Array deviation(const Sampler& sampler, const Array& variance, double beta, double part) {
    const std::string& kind = sampler.variance;
    const double small = std::max(part * beta, 1e-20);
    if (kind == "fixed_small") return {std::sqrt(small)};
    if (kind == "fixed_large") return {std::sqrt(beta)};
    require_variance(sampler, !variance.empty());
    Array values = variance;
    const bool learned = kind == "learned";
    const double most = std::log(beta), least = std::log(small);
    for (double& value : values) {
        const double fraction = (value + 1) / 2;
        value = learned ? std::sqrt(value) : std::exp(0.5 * (fraction * most + (1 - fraction) * least));
    }
    return values;
}

class Ddpm : public Method {
    using Method::Method;

    bool advance(const Step& step, Estimate& estimate) override {
        const auto& [now, after] = step;
        const double ratio = now.alpha / after.alpha, beta = 1 - ratio * ratio;
        const double part = (after.sigma / now.sigma) * (after.sigma / now.sigma);
        clip(estimate.x0, sampler_);
        const Array s = now.time > 0 ? deviation(sampler_, estimate.variance, beta, part) : Array();
        const double of_x0 = after.alpha * beta / (now.sigma * now.sigma), of_x = ratio * part;
        for (std::size_t i = 0; i < x_.size(); ++i) x_[i] = of_x0 * estimate.x0[i] + of_x * x_[i];
        if (!s.empty()) {
            const std::vector<float> z = draw_(x_.size());
            for (std::size_t i = 0; i < x_.size(); ++i)
                x_[i] = x_[i] + s[s.size() == 1 ? 0 : i] * static_cast<double>(z[i]);
        }
        return true;
    }
};

}  // namespace

std::unique_ptr<Method> ddpm(Setting setting) { return std::make_unique<Ddpm>(std::move(setting)); }

}  // namespace dit_runtime
