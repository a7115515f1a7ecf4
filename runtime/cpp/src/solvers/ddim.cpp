#include <cmath>

#include "method.hpp"

namespace dit_runtime {
namespace {

class Ddim : public Method {
    using Method::Method;

    bool advance(const Step& step, Estimate& estimate) override {
        const auto& [now, after] = step;
        const double ratio = now.alpha / after.alpha;
        const double deviation = eta_ * after.sigma / now.sigma * std::sqrt(1 - ratio * ratio);
        clip(estimate.x0, sampler_);
        const double noise = std::sqrt(after.sigma * after.sigma - deviation * deviation);
        for (std::size_t i = 0; i < x_.size(); ++i) x_[i] = after.alpha * estimate.x0[i] + noise * estimate.epsilon[i];
        if (deviation > 0) add_noise(deviation);
        return true;
    }
};

}  // namespace

std::unique_ptr<Method> ddim(Setting setting) { return std::make_unique<Ddim>(std::move(setting)); }

}  // namespace dit_runtime
