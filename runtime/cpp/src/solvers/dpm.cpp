#include <cmath>
#include <deque>

#include "method.hpp"

namespace dit_runtime {
namespace {

class Dpm : public Method {
  public:
    Dpm(Setting setting, int order, bool noisy)
        : Method(std::move(setting)), order_(static_cast<std::size_t>(order)), noisy_(noisy) {}

  private:
    bool advance(const Step& step, Estimate& estimate) override {
        const auto& [now, after] = step;
        const bool few = sampler_.lower_order_final;
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
        const double width = noisy_ ? 2 * h : h;
        const double phi1 = -std::expm1(-width), phi2 = 1 - phi1 / width;
        const double of_x = after.sigma / now.sigma * (noisy_ ? std::exp(-h) : 1.0);
        const double weight = sampler_.solver_type == "heun" ? phi2 : phi1 / 2;
        const auto of = [&](std::size_t from, std::size_t to) { return h / (lambdas_[from] - lambdas_[to]); };
        const double alpha = after.alpha, *const d0 = data_[0].data();
        double* const x = x_.data();
        if (current == 1) {
            for (std::size_t i = 0; i < x_.size(); ++i) x[i] = of_x * x[i] + alpha * (phi1 * d0[i]);
        } else if (current == 2) {
            const double *const d1 = data_[1].data(), of_first = of(0, 1);
            for (std::size_t i = 0; i < x_.size(); ++i)
                x[i] = of_x * x[i] + alpha * (phi1 * d0[i] + weight * ((d0[i] - d1[i]) * of_first));
        } else {
            const double *const d1 = data_[1].data(), *const d2 = data_[2].data();
            const double of_first = of(0, 1), of_second = of(1, 2), of_bend = of(0, 2);
            const double back = (lambdas_[0] - lambdas_[1]) / h, of_bent = 0.5 - phi2 / h;
            for (std::size_t i = 0; i < x_.size(); ++i) {
                const double first = (d0[i] - d1[i]) * of_first;
                const double bend = (first - (d1[i] - d2[i]) * of_second) * of_bend;
                const double slope = first + bend * back;
                x[i] = of_x * x[i] + alpha * (phi1 * d0[i] + phi2 * slope + of_bent * bend);
            }
        }
        const double deviation = noisy_ ? after.sigma * std::sqrt(phi1) : 0.0;
        if (deviation > 0) add_noise(deviation);
        return true;
    }

    const std::size_t order_;
    const bool noisy_;
    std::deque<Array> data_;  // predicted x₀, newest first
    std::deque<double> lambdas_;
};

}  // namespace

std::unique_ptr<Method> dpm(Setting setting, int order, bool noisy) {
    return std::make_unique<Dpm>(std::move(setting), order, noisy);
}

}  // namespace dit_runtime
