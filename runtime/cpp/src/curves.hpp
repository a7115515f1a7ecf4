// Curves of σ between two ends: what spreads the steps of a run other than evenly. Mirrors
// dit_runtime/sampling/curves.py.
#pragma once

#include <string>

#include "process.hpp"

namespace dit_runtime {

// σ from `first` down to `last`; (N,).
//
// "karras": σ^(1/7) is even (Karras et al. 2022, arXiv 2206.00364, equation 5). "exponential": log σ is even.
// "beta": σ is a quantile of Beta(0.6, 0.6) at even probabilities (Lee et al. 2024, arXiv 2407.12173).
Array curve(const std::string& name, double first, double last, std::int64_t steps);

// σ/α of each training step.
Array training_ratios(const Process& process);

// σ/α along a curve between the ends of the training steps; (N,).
Array curve_ratios(const Process& process, const std::string& name, std::int64_t steps);

// Where in `rising` a value lies, between 0 and the last index; as NumPy's interp.
double place_in(const Array& rising, double value);

// x with I_x(a, a) = p for a = 0.6, by Newton's method up to 1/2, and mirrored above it.
//
// ∫₀ˣ (t (1 - t))ᵃ⁻¹ dt = xᵃ Σ c_n xⁿ / (a + n),  c_n = c_{n-1} (n - a) / n.  The start, x with (2 x)ᵃ = 2 p, lies
// below the root, and the integral is concave: so every iterate does.
double beta_quantile(double probability);

}  // namespace dit_runtime
