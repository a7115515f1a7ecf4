#include <cmath>

#include "method.hpp"

namespace dit_runtime {
namespace {

class Sde : public Method {
    using Method::Method;

    bool advance(const Step& step, Estimate& estimate) override {
        const double width = step.now.sigma - step.after.sigma;
        for (std::size_t i = 0; i < x_.size(); ++i) x_[i] = x_[i] + width * (estimate.x0[i] - 2 * estimate.epsilon[i]);
        if (step.after.sigma > 0) add_noise(std::sqrt(2 * step.now.sigma * width));
        return true;
    }
};

}  // namespace

std::unique_ptr<Method> sde(Setting setting) { return std::make_unique<Sde>(std::move(setting)); }

}  // namespace dit_runtime
