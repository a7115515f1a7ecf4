// Noise as PyTorch's CPU generator draws it: one seed, one picture, in PyTorch, Python and C++.
// Mirrors dit_runtime/sampling/noise.py line by line.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <random>
#include <vector>

namespace dit_runtime {

// Draws the next `size` numbers of a run, all samples' together.
using Draw = std::function<std::vector<float>(std::size_t size)>;

// One stream of `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`, draw after draw.
//
// MT19937 (Matsumoto and Nishimura 1998) seeded with the low 32 bits, then Box-Muller:
// n₁ = √(-2 ln u₁) cos(2π u₂), n₂ = √(-2 ln u₁) sin(2π u₂).
class Noise {
  public:
    explicit Noise(std::uint64_t seed) : engine_(static_cast<std::uint32_t>(seed)) {}

    // The next raw 32-bit integer of the stream.
    std::uint32_t bits() { return static_cast<std::uint32_t>(engine_()); }

    // The next standard normal values; draws of 16 and more go by blocks, smaller ones by pairs, as in PyTorch.
    std::vector<float> normal(std::size_t size);

  private:
    float uniform();
    double next();

    std::mt19937 engine_;
    std::optional<double> cached_;  // the second value of a pair, for draws of fewer than 16
};

// Returns what draws [B, C, H, W]: one stream for the batch (one seed, as PyTorch), or one for each sample.
//
// A run draws x_T first, then once for every step that adds noise.
Draw draw(const std::vector<std::uint64_t>& seeds, std::size_t batch);

}  // namespace dit_runtime
