// Solvers: each asks for denoise(x, t) and returns the final x. Mirrors dit_runtime/sampling/solvers.py line by line.
//
// Those of a noise schedule are written in ᾱ alone, α = √ᾱ and σ = √(1 - ᾱ); those of a velocity in t, from noise at 0
// to data at 1. A prime marks what is after the step. Arithmetic is double.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "noise.hpp"
#include "schedule.hpp"

namespace dit_runtime {

// What the network says of (x, t); the variance is empty where it is not learned.
struct Prediction {
    std::vector<float> prediction;
    std::vector<float> variance;
};

using Denoise = std::function<Prediction(const Array& x, double t)>;

// Of the network, a step.
inline std::int64_t evaluations(const std::string& solver) { return solver == "heun" ? 2 : 1; }

inline constexpr double LAST_STEP = 0.04;  // of the SDE: its authors' value

// Every t that a run will ask for, in order; (N,), or (2 N,) where a step asks twice.
Array plan(const Diffusion& diffusion, const std::string& solver, std::int64_t steps, const std::string& spacing = "");

// A step's t and the next one's, evenly from 0 to 1; where noise is added, a last step of LAST_STEP; (N + 1,).
Array flow_times(const Diffusion& diffusion, const std::string& solver, std::int64_t steps,
                 const std::string& spacing = "");

// A run from x_T that draws its noise with `draw(size)`; eta belongs to DDIM.
Array solve(const Diffusion& diffusion, const std::string& solver, std::int64_t steps, Array x, const Draw& draw,
            const Denoise& denoise, double eta = 0.0, const std::string& spacing = "");

// DDPM, Ho et al. 2020 (arXiv 2006.11239), algorithm 2, on the steps that are kept.
//
// α = ᾱ / ᾱ',  β = 1 - α,  x' = √ᾱ' β / (1 - ᾱ) x₀ + √α (1 - ᾱ') / (1 - ᾱ) x + σ z, with z = 0 at t = 0.
Array ddpm(const Diffusion& diffusion, const Schedule& schedule, Array x, const Draw& draw, const Denoise& denoise);

// DDIM, Song et al. 2020 (arXiv 2010.02502), equations 12 and 16.
//
// s = η √((1 - ᾱ') / (1 - ᾱ)) √(1 - ᾱ / ᾱ'),  x' = √ᾱ' x₀ + √(1 - ᾱ' - s²) ε + s z, with no draw where s = 0.
Array ddim(const Diffusion& diffusion, const Schedule& schedule, Array x, const Draw& draw, const Denoise& denoise,
           double eta);

// DPM-Solver++ multistep, Lu et al. 2022 (arXiv 2211.01095), algorithm 2, and its third-order sibling.
//
// x' = σ'/σ x + α' (φ₁ D₀ + φ₂ D₁ + φ₃ D₂),  h = λ' - λ,  φ₁ = 1 - e⁻ʰ,  φ₂ = 1 - φ₁/h,  φ₃ = 1/2 - φ₂/h,
// where D₀ is the predicted x₀ and D₁, D₂ its scaled differences over past steps; "midpoint" has φ₂ = φ₁/2 in
// second-order steps. φ₃ is the authors' (and diffusers'), half of Taylor's: the observed order is 2 to 3.
Array dpm(const Diffusion& diffusion, const Schedule& schedule, Array x, const Denoise& denoise, int order);

// Euler's method on dx/dt = v, the flow from noise to data: x' = x + (t' - t) v.
Array euler(const Array& times, Array x, const Denoise& denoise);

// Heun's method on the same flow, of order 2: x' = x + (t' - t) (v(x, t) + v(x + (t' - t) v, t')) / 2.
Array heun(const Array& times, Array x, const Denoise& denoise);

// Euler-Maruyama on SiT's reverse SDE, Ma et al. 2024 (arXiv 2401.08740), with their default coefficient.
//
// dx = (v + w s) dt + √(2 w) dW,  w = 1 - t,  and the score s = -ε / (1 - t) = (t v - x) / (1 - t): so the drift is
// (1 + t) v - x. The last step is the drift alone.
Array sde(const Array& times, Array x, const Draw& draw, const Denoise& denoise);

}  // namespace dit_runtime
