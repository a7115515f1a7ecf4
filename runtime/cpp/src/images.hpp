// Pictures as bytes. Mirrors dit_runtime/images.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "manifest.hpp"

namespace dit_runtime {

// [N, 3, H, W] or [N, 3, F, H, W] in [0, 1] -> uint8 with channels last, by round-half-even(255 x).
std::vector<std::uint8_t> to_uint8(const std::vector<float>& images, const Shape& shape);

// Its inverse: uint8 [N, H, W, 3] -> [N, 3, H, W] in [0, 1].
std::vector<float> to_unit(const std::vector<std::uint8_t>& pictures, const Shape& shape);

// 10 log10(peak² / mean((a − b)²)) in dB; ∞ where they are equal.
template <typename Number>
double psnr(const Number* first, const Number* second, std::size_t size, double peak = 255.0) {
    double error = 0;
    for (std::size_t i = 0; i < size; ++i) {
        const double difference = static_cast<double>(first[i]) - static_cast<double>(second[i]);
        error += difference * difference;
    }
    error /= static_cast<double>(size);
    return error == 0 ? std::numeric_limits<double>::infinity() : 10 * std::log10(peak * peak / error);
}

}  // namespace dit_runtime
