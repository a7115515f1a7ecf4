#include <cmath>
#include <deque>

#include "method.hpp"

namespace dit_runtime {
namespace {

class Deis : public Method {
  public:
    Deis(Setting setting, int order) : Method(std::move(setting)), order_(static_cast<std::size_t>(order)) {}

  private:
    bool advance(const Step& step, Estimate& estimate) override {
        const auto& [now, after] = step;
        const bool few = sampler_.lower_order_final;
        data_.push_front(std::move(estimate.epsilon));
        lambdas_.push_front(now.log_snr());
        if (data_.size() > order_) data_.pop_back(), lambdas_.pop_back();
        std::size_t current = data_.size();
        if (after.sigma == 0 || after.sigma == now.sigma)
            current = 1;
        else if (few)
            current = std::min(current, steps_.size() - index_);
        const double h = after.log_snr() - lambdas_[0];
        const double area0 = std::expm1(-h), area1 = -h * std::exp(-h) - area0;
        const double area2 = h * h * std::exp(-h) - 2 * area1;
        const double of_x = after.alpha / now.alpha;
        for (std::size_t i = 0; i < x_.size(); ++i) {
            double sum = area0 * data_[0][i];
            const double first = current > 1 ? (data_[1][i] - data_[0][i]) / (lambdas_[0] - lambdas_[1]) : 0;
            if (current > 1) sum = sum + area1 * first;
            if (current > 2) {
                const double second = (data_[2][i] - data_[1][i]) / (lambdas_[1] - lambdas_[2]);
                const double bend = (second - first) / (lambdas_[0] - lambdas_[2]);
                sum = sum + (area2 - (lambdas_[0] - lambdas_[1]) * area1) * bend;
            }
            x_[i] = of_x * (x_[i] + now.sigma * sum);
        }
        return true;
    }

    const std::size_t order_;
    std::deque<Array> data_;  // predicted ε, newest first
    std::deque<double> lambdas_;
};

}  // namespace

std::unique_ptr<Method> deis(Setting setting, int order) { return std::make_unique<Deis>(std::move(setting), order); }

}  // namespace dit_runtime
