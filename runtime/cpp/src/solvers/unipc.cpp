#include <algorithm>
#include <cmath>
#include <deque>

#include "method.hpp"

namespace dit_runtime {
namespace {

struct Node {
    double lambda;
    Array data;  // the x₀ that was predicted there
};
using Nodes = std::vector<const Node*>;

// Solves Σ w_k r_kⁱ = m_i, i from 0, by Björck & Pereyra 1970.
Array solve_weights(const Array& rates, Array weights) {
    const std::size_t count = rates.size();
    for (std::size_t column = 0; column + 1 < count; ++column)
        for (std::size_t row = count - 1; row > column; --row) weights[row] -= rates[column] * weights[row - 1];
    for (std::size_t next = count; next > 1; --next) {
        const std::size_t column = next - 2;
        for (std::size_t row = column + 1; row < count; ++row) weights[row] /= rates[row] - rates[row - column - 1];
        for (std::size_t row = column; row + 1 < count; ++row) weights[row] -= weights[row + 1];
    }
    return weights;
}

// x' = σ'/σ x + α' (φ₁ D₀ + Σ w_k (D_k - D₀) / r_k),  h = λ' - λ,  r_k = (λ_k - λ) / h.
//
// φ₁ = 1 - e⁻ʰ, φ_{i+1} = 1/i! - φ_i/h, and the weights solve Σ w_k r_kⁱ⁻¹ = i! φ_{i+1} for i = 1 … n. But a single
// weight is B/2, where B is h (bh1) or φ₁ (bh2); of several, the paper's B(h) cancels.
Array advance_with(const Array& x, const Step& step, const Nodes& nodes, const Sampler& sampler) {
    const auto& [now, after] = step;
    const double h = after.log_snr() - nodes[0]->lambda, phi1 = -std::expm1(-h);
    double phi = phi1, factorial = 1;
    Array moments, rates;
    for (std::size_t index = 1; index < nodes.size(); ++index) {
        factorial *= static_cast<double>(index);
        phi = 1 / factorial - phi / h;
        moments.push_back(factorial * phi);
        rates.push_back((nodes[index]->lambda - nodes[0]->lambda) / h);
    }
    if (nodes.size() == 2) moments = {(sampler.solver_type == "bh1" ? h : phi1) / 2};
    const Array weights = solve_weights(rates, moments);
    const double of_x = after.sigma / now.sigma;
    Array made(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
        double sum = phi1 * nodes[0]->data[i];
        for (std::size_t k = 0; k < weights.size(); ++k)
            sum = sum + weights[k] / rates[k] * (nodes[k + 1]->data[i] - nodes[0]->data[i]);
        made[i] = of_x * x[i] + after.alpha * sum;
    }
    return made;
}

class Unipc : public Method {
  public:
    Unipc(Setting setting, int order) : Method(std::move(setting)), order_(static_cast<std::size_t>(order)) {}

  private:
    bool advance(const Step& step, Estimate& estimate) override {
        const auto& [now, after] = step;
        Node here = {now.log_snr(), std::move(estimate.x0)};
        if (!nodes_.empty()) {
            Nodes through = newest(current_);
            through.push_back(&here);
            x_ = advance_with(start_, steps_[index_ - 1], through, sampler_);
        }
        nodes_.push_front(std::move(here));
        if (nodes_.size() > order_) nodes_.pop_back();
        start_ = x_;
        current_ = nodes_.size();
        if (after.sigma == 0 || after.sigma == now.sigma)
            current_ = 1;
        else if (sampler_.lower_order_final)
            current_ = std::min(current_, steps_.size() - index_);
        x_ = advance_with(x_, step, newest(current_), sampler_);
        return true;
    }

    Nodes newest(std::size_t count) const {
        Nodes some;
        for (std::size_t index = 0; index < count; ++index) some.push_back(&nodes_[index]);
        return some;
    }

    const std::size_t order_;
    std::deque<Node> nodes_;   // newest first
    Array start_;              // x before the last step
    std::size_t current_ = 0;  // order of the last step
};

}  // namespace

std::unique_ptr<Method> unipc(Setting setting, int order) { return std::make_unique<Unipc>(std::move(setting), order); }

}  // namespace dit_runtime
