#include "curves.hpp"

#include <algorithm>
#include <cmath>

namespace dit_runtime {
namespace {

const double RHO = 7.0;   // Karras et al.'s
const double BETA = 0.6;  // Lee et al.'s, for both parameters
// Enough for double: a term is half of the last at most, and the start is off by 10 %.
const int NEWTON = 6, TERMS = 60;

}  // namespace

Array curve(const std::string& name, double first, double last, std::int64_t steps) {
    if (name == "exponential") {
        Array points = linspace(std::log(first), std::log(last), steps);
        for (double& point : points) point = std::exp(point);
        return points;
    }
    Array points = linspace(0, 1, steps);
    const double high = std::pow(first, 1 / RHO), low = std::pow(last, 1 / RHO);
    for (double& point : points)
        point = name == "karras" ? std::pow(high + point * (low - high), RHO)
                                 : last + beta_quantile(1 - point) * (first - last);
    return points;
}

Array training_ratios(const Process& process) {
    Array levels = process.alpha_bar();
    for (double& level : levels) level = std::sqrt((1 - level) / level);
    return levels;
}

Array curve_ratios(const Process& process, const std::string& name, std::int64_t steps) {
    const Array all = training_ratios(process);
    return curve(name, all.back(), all.front(), steps);
}

double place_in(const Array& rising, double value) {
    const auto above = std::upper_bound(rising.begin(), rising.end(), value);
    if (above == rising.begin()) return 0;
    if (above == rising.end()) return static_cast<double>(rising.size() - 1);
    const double low = *(above - 1);
    return 1 / (*above - low) * (value - low) + static_cast<double>(above - rising.begin() - 1);
}

double beta_quantile(double probability) {
    const double low = std::min(probability, 1 - probability);
    const double target = low * (std::pow(std::tgamma(BETA), 2) / std::tgamma(2 * BETA));
    double x = 0.5 * std::pow(2 * low, 1 / BETA);
    for (int round = 0; round < NEWTON; ++round) {
        double total = 1 / BETA, term = 1;
        for (int n = 1; n < TERMS; ++n) {
            term = term * ((n - BETA) / n) * x;
            total = total + term / (BETA + n);
        }
        x = x - (x * total - target * std::pow(x, 1 - BETA)) * std::pow(1 - x, 1 - BETA);
    }
    return probability > 0.5 ? 1 - x : x;
}

}  // namespace dit_runtime
