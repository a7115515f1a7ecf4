#include <cmath>
#include <deque>

#include "method.hpp"

namespace dit_runtime {
namespace {

class Dpm : public Method {
  public:
    Dpm(Setting setting, int order) : Method(std::move(setting)), order_(static_cast<std::size_t>(order)) {}

  private:
    bool advance(const Step& step, Estimate& estimate) override {
        const auto& [now, after] = step;
        const bool few = sampler_.lower_order_final && steps_.size() < 15;
        data_.push_front(std::move(estimate.x0));
        lambdas_.push_front(now.log_snr());
        if (data_.size() > order_) data_.pop_back(), lambdas_.pop_back();
        const std::size_t left = steps_.size() - 1 - index_;
        std::size_t current = data_.size();
        if (left == 0 && (few || sampler_.euler_at_final || after.sigma == 0 || after.sigma == now.sigma))
            current = 1;
        else if (left == 1 && few)
            current = std::min<std::size_t>(current, 2);
        const double h = after.log_snr() - lambdas_[0];
        const double phi1 = -std::expm1(-h), phi2 = 1 - phi1 / h;
        const double of_x = after.sigma / now.sigma;
        const double weight = sampler_.solver_type == "midpoint" ? phi1 / 2 : phi2;
        for (std::size_t i = 0; i < x_.size(); ++i) {
            double sum = phi1 * data_[0][i];
            const double first = current > 1 ? (data_[0][i] - data_[1][i]) * (h / (lambdas_[0] - lambdas_[1])) : 0;
            if (current == 2) sum = sum + weight * first;
            if (current == 3) {
                const double second = (data_[1][i] - data_[2][i]) * (h / (lambdas_[1] - lambdas_[2]));
                const double bend = (first - second) * (h / (lambdas_[0] - lambdas_[2]));
                const double slope = first + bend * ((lambdas_[0] - lambdas_[1]) / h);
                sum = sum + phi2 * slope + (0.5 - phi2 / h) * bend;
            }
            x_[i] = of_x * x_[i] + after.alpha * sum;
        }
        return true;
    }

    const std::size_t order_;
    std::deque<Array> data_;  // predicted x₀, newest first
    std::deque<double> lambdas_;
};

}  // namespace

std::unique_ptr<Method> dpm(Setting setting, int order) { return std::make_unique<Dpm>(std::move(setting), order); }

}  // namespace dit_runtime
