#include "method.hpp"

namespace dit_runtime {
namespace {

class Euler : public Method {
    using Method::Method;

    bool advance(const Step& step, Estimate& estimate) override {
        const double width = step.after.sigma - step.now.sigma;
        for (std::size_t i = 0; i < x_.size(); ++i) x_[i] = x_[i] + width * (estimate.epsilon[i] - estimate.x0[i]);
        return true;
    }
};

}  // namespace

std::unique_ptr<Method> euler(Setting setting) { return std::make_unique<Euler>(std::move(setting)); }

}  // namespace dit_runtime
