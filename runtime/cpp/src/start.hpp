// Where a run starts from a picture's latents, and what of them it keeps: image-to-image and inpainting.
// Mirrors dit_runtime/sampling/start.py.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "noise.hpp"

namespace dit_runtime {

using Encoded = std::map<std::string, std::vector<float>>;  // by output of the encoder, (N or 1, *state)

// The number of steps that a run leaves out whose start is a picture with the noise of the next one (SDEdit, Meng et
// al. 2021, arXiv 2108.01073). Diffusers rounds in this way.
std::size_t first_step(std::int64_t steps, std::optional<double> strength);

// A picture's latents, and noise of the run's own: the state before the first step, and what is kept after each.
class Start {
  public:
    // Draws the latents of `samples` where the encoder gives a variance, then the noise, as diffusers' pipelines do.
    // `encoded` has a row for each sample, or one for all; `levels` are those of the evaluations.
    Start(const Encoded& encoded, std::size_t samples, const Shape& state, const Draw& draw, std::vector<Level> levels);

    // The latents with the noise that a state has after so many evaluations.
    Array at(std::size_t evaluations) const;
    // Puts them into the state in the places where the mask, (samples or 1, h, w), is false.
    void keep(std::size_t evaluations, Array& state, const std::vector<bool>& mask) const;

  private:
    Array latents_, noise_;
    std::vector<Level> levels_;
    std::size_t row_, area_;  // the numbers of a sample, and of its channel
};

}  // namespace dit_runtime
