#include "method.hpp"

namespace dit_runtime {
namespace {

class Scm : public Method {
    using Method::Method;

    bool advance(const Step& step, Estimate& estimate) override {
        for (std::size_t i = 0; i < x_.size(); ++i) x_[i] = step.after.alpha * estimate.x0[i];
        if (step.after.sigma > 0) add_noise(step.after.sigma);
        return true;
    }
};

}  // namespace

std::unique_ptr<Method> scm(Setting setting) { return std::make_unique<Scm>(std::move(setting)); }

}  // namespace dit_runtime
