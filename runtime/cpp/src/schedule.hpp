// What a model was trained with (Diffusion), how it is sampled unless asked otherwise (Sampler), and a run's steps.
// Mirrors dit_runtime/sampling/schedule.py line by line.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace dit_runtime {

using Array = std::vector<double>;

inline const std::map<std::string, int> ORDERS = {{"dpm++1", 1}, {"dpm++", 2}, {"dpm++3", 3}};  // of DPM-Solver++
inline const std::vector<std::string> NOISE_SOLVERS = {"ddpm", "ddim", "dpm++1", "dpm++", "dpm++3"};
inline const std::vector<std::string> FLOW_SOLVERS = {"euler", "heun", "sde"};  // along a velocity, in continuous time
inline const std::vector<std::string> SOLVERS = {"ddpm", "ddim", "dpm++1", "dpm++", "dpm++3", "euler", "heun", "sde"};
inline const std::map<std::string, std::vector<std::string>> PREDICTIONS = {
    // What a network may predict, and the solvers that fit.
    {"epsilon", NOISE_SOLVERS},
    {"v_prediction", NOISE_SOLVERS},
    {"sample", NOISE_SOLVERS},
    {"velocity", FLOW_SOLVERS},  // x₀ - ε on the straight line t x₀ + (1 - t) ε (SiT, Ma et al. 2024)
};
inline const std::vector<std::string> SPACINGS = {"stride", "respaced", "leading", "trailing", "linspace"};
inline const std::map<std::string, std::vector<std::string>> CHOICES = {
    {"beta_schedule", {"linear", "scaled_linear", "squaredcos_cap_v2"}},
    {"prediction", {"epsilon", "v_prediction", "sample", "velocity"}},
    {"solver", SOLVERS},
    {"ddpm_spacing", SPACINGS},
    {"ddim_spacing", SPACINGS},
    {"dpm_spacing", SPACINGS},
    {"variance", {"fixed_small", "fixed_large", "learned", "learned_range"}},
    {"solver_type", {"midpoint", "heun"}},
    {"final_sigmas_type", {"zero", "sigma_min"}},
};

// How a model is sampled unless asked otherwise.
struct Sampler {
    std::string solver = "ddim";
    std::string ddpm_spacing = "respaced";
    std::string ddim_spacing = "stride";
    std::string dpm_spacing = "linspace";
    std::int64_t steps_offset = 0;  // added to the timesteps of "leading"
    // DDPM and DDIM
    bool clip_sample = false;  // clamp the predicted x_0 to ± clip_sample_range
    double clip_sample_range = 1.0;
    // DDIM
    bool set_alpha_to_one = true;  // the run ends at ᾱ = 1, else at the schedule's first ᾱ
    // DDPM
    std::string variance = "learned_range";  // "learned": the network gives σ² itself; "learned_range": v in [-1, 1]
    // DPM-Solver++
    std::string solver_type = "midpoint";      // of its second-order steps
    bool lower_order_final = true;             // the last two steps of a run of fewer than 15 are of order 2 and 1
    bool euler_at_final = false;               // the last step is of order 1
    std::string final_sigmas_type = "zero";    // the run ends at σ = 0, else at the schedule's smallest σ
    std::optional<double> lambda_min_clipped;  // timesteps whose log(α/σ) is smaller are left out
};

// The forward process a model was trained with: the manifest's `diffusion` section.
struct Diffusion {
    std::int64_t train_steps = 1000;       // also the most that a run may take
    std::string beta_schedule = "linear";  // of the noise schedule, as the two below; a velocity has none
    double beta_start = 1e-4;
    double beta_end = 0.02;
    std::optional<Array> trained_betas;  // instead of the three fields above
    std::string prediction = "epsilon";
    Sampler sampler;

    // β of each training step: Ho et al. 2020 (linear), Rombach et al. 2022 (scaled), Nichol & Dhariwal 2021 (cos).
    Array betas() const;
    // ᾱ_t = Π (1 - β_s) over s ≤ t.
    Array alpha_bar() const;
};

// A run's steps, noisiest first; a step leads from ᾱ to ᾱ_prev.
struct Schedule {
    std::vector<std::int64_t> timesteps;  // (N,)
    Array alpha_bar;                      // (N,)
    Array alpha_bar_prev;                 // (N,)
};

// The training steps that a run visits, descending; an empty spacing is the solver's default.
//
// "stride" and "respaced" are Nichol & Dhariwal 2021's (there "ddimN" and "N"); "leading", "trailing" and "linspace"
// are those of Lin et al. 2023, table 2. DPM-Solver++ divides the time into one interval a step, so its "leading" and
// "linspace" take N + 1 points and leave the last, t = 0, out.
std::vector<std::int64_t> timesteps(const Diffusion& diffusion, const std::string& solver, std::int64_t steps,
                                    const std::string& spacing = "");

// A run's timesteps with the noise level before and after each.
//
// The level after a step is that of the next timestep, but for DDIM with the spacings of Lin et al.: there it is
// T // N training steps below, wherever the next timestep lies.
Schedule make_schedule(const Diffusion& diffusion, const std::string& solver, std::int64_t steps,
                       const std::string& spacing = "");

// Refuses a solver that is not known, or that wants another prediction than this model's.
void require_fit(const Diffusion& diffusion, const std::string& solver);

void require_steps(const Diffusion& diffusion, std::int64_t steps);

// λ = log(α/σ), half the logarithm of the signal-to-noise ratio; ∞ without noise.
double log_snr(double alpha_bar);

}  // namespace dit_runtime
