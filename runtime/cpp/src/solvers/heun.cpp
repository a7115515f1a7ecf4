#include "method.hpp"

namespace dit_runtime {
namespace {

class Heun : public Method {
    using Method::Method;

    const Level& level() const override { return first_.empty() ? steps_[index_].now : steps_[index_].after; }

    bool advance(const Step& step, Estimate& estimate) override {
        const double width = step.after.sigma - step.now.sigma;
        if (first_.empty()) {
            start_ = x_;
            first_.resize(x_.size());
            for (std::size_t i = 0; i < x_.size(); ++i) {
                first_[i] = estimate.epsilon[i] - estimate.x0[i];
                x_[i] = x_[i] + width * first_[i];
            }
            return false;
        }
        for (std::size_t i = 0; i < x_.size(); ++i)
            x_[i] = start_[i] + width / 2 * (first_[i] + (estimate.epsilon[i] - estimate.x0[i]));
        first_.clear();
        return true;
    }

    Array start_, first_;  // x and v of the step, between its two evaluations
};

}  // namespace

std::unique_ptr<Method> heun(Setting setting) { return std::make_unique<Heun>(std::move(setting)); }

}  // namespace dit_runtime
