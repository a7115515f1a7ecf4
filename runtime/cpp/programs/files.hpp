// What dit-generate reads and writes: PNG, and NumPy's .npz and .npy.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dit/dit.hpp"

// All pictures in one, as near to a square as can be.
void write_png(const std::string& path, const dit::Images& images);

// The form ADM's evaluation reads: `arr_0`, uint8 [N, H, W, 3].
void write_npz(const std::string& path, const dit::Images& images);

void write_npy(const std::string& path, const std::vector<float>& values, const std::vector<std::int64_t>& shape);

// Arrays by port from NAME=FILE.npy …, or from one FILE.npz; none without words.
dit::Condition read_condition(const std::vector<std::string>& words, const char* flag);

// The numbers of a .npy file of this shape.
std::vector<float> read_latents(const std::string& path, const std::vector<std::int64_t>& shape);
