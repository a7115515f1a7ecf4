// Pictures as bytes. Mirrors dit_runtime/images.py.
#pragma once

#include <cstdint>
#include <vector>

#include "manifest.hpp"

namespace dit_runtime {

// [N, 3, H, W] in [0, 1] -> uint8 [N, H, W, 3] by round-half-even(255 x).
std::vector<std::uint8_t> to_uint8(const std::vector<float>& images, const Shape& shape);

// 10 log10(peak² / mean((a − b)²)) in dB; ∞ where they are equal.
double psnr(const std::uint8_t* first, const std::uint8_t* second, std::size_t size, double peak = 255.0);

}  // namespace dit_runtime
