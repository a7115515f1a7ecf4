// The files of dit-generate: PNG, and NumPy's .npz and .npy.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dit/dit.hpp"

// All pictures in one, as near to a square as can be; of videos a row each, of all frames.
void write_png(const std::string& path, const dit::Images& images);

// A PNG for each picture, 0.png …, or for each frame of each video, 0-0.png …, with zeros before a number.
void write_folder(const std::string& path, const dit::Images& images);

// The form ADM's evaluation reads: `arr_0`, uint8 [N, H, W, 3], of videos [N, F, H, W, 3].
void write_npz(const std::string& path, const dit::Images& images);

void write_npy(const std::string& path, const std::vector<float>& values, const std::vector<std::int64_t>& shape);

// Arrays by port from NAME=FILE.npy …, or from one FILE.npz; none without words. FILE.txt has integers, a row a line.
// Refuses shapes that are not the port's.
dit::Condition read_condition(const std::vector<std::string>& words, const std::string& flag,
                              const std::vector<dit::Port>& ports);

// The numbers of a .npy file of so many rows of this shape; of any number of rows where `rows` is 0.
std::vector<float> read_latents(const std::string& path, std::size_t rows, const std::vector<std::int64_t>& row);
