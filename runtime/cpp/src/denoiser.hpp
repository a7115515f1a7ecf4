// The adapter between networks and solvers: whatever a network predicts, solvers read x₀ and ε.
// Mirrors dit_runtime/sampling/denoiser.py line by line.
#pragma once

#include <string>
#include <vector>

#include "schedule.hpp"

namespace dit_runtime {

// The network's output at (x, time); the variance is empty if it is not learned.
struct Prediction {
    std::vector<float> prediction;
    std::vector<float> variance;
};

// A network's answer at x = α x₀ + σ ε.
struct Estimate {
    Array x0, epsilon;
    Array variance;  // as the network gives it, where it is learned
};

// x₀ and ε of a prediction: of ε, of x₀, of v = α ε - σ x₀ (Salimans & Ho 2022), or of a flow's ε - x₀.
Estimate estimate(const std::string& prediction, const Array& x, const Prediction& output, const Level& level);

void clip(Array& x0, const Sampler& sampler);

}  // namespace dit_runtime
