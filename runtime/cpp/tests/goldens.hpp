// The numbers that Python wrote.
#pragma once

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "schedule.hpp"

inline const nlohmann::json& goldens() {
    static const nlohmann::json table = nlohmann::json::parse(std::ifstream(GOLDENS));
    return table;
}

// The largest difference, relative to the largest number; ∞ for NaN and for another count.
template <typename Values, typename Expected>
double apart(const Values& values, const Expected& expected) {
    double most = 0, size = 1e-30;
    if (values.size() != expected.size()) return INFINITY;
    for (std::size_t index = 0; index < values.size(); ++index) {
        const double gap = std::abs(static_cast<double>(values[index]) - static_cast<double>(expected[index]));
        if (!(gap <= most)) most = std::isnan(gap) ? INFINITY : gap;
        size = std::max(size, std::abs(static_cast<double>(expected[index])));
    }
    return most / size;
}
