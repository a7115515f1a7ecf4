// The forward process x = α x₀ + σ ε that a model was trained with (Process), and its sampling defaults (Sampler).
// Mirrors dit_runtime/sampling/process.py line by line.
//
// A noise process has the betas of a discrete schedule and predicts ε, v or x₀ at a training step t. A flow has
// α = 1 - σ with σ from 1 (noise) to 0 (data) and predicts the velocity dx/dσ = ε - x₀ at the time σ.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "facts.hpp"

namespace dit_runtime {

using Array = std::vector<double>;

// As facts.json has them; not for use before main.
extern const std::vector<std::string> SOLVERS, NOISE_SOLVERS, FLOW_SOLVERS, SPACINGS, FLOW_SPACINGS, CURVES;

// The sampling defaults of a model.
struct Sampler {
    std::string solver = "ddim";
    std::int64_t steps = default_steps();  // of a run
    // Noise processes
    std::string ddpm_spacing = "respaced";
    std::string ddim_spacing = "stride";
    std::string dpm_spacing = "linspace";
    std::int64_t steps_offset = 0;  // added to the timesteps of "leading"
    // DDPM and DDIM
    bool clip_sample = false;  // clamp the predicted x₀ to ± clip_sample_range
    double clip_sample_range = 1.0;
    // DDIM
    bool set_alpha_to_one = true;  // the run ends at ᾱ = 1, else at the schedule's first ᾱ
    // DDPM
    std::string variance = "learned_range";  // "learned": the network gives σ² itself; "learned_range": v in [-1, 1]
    // Multistep solvers
    std::string solver_type = "midpoint";  // of DPM-Solver++: "heun", else midpoint; of UniPC: "bh1", else bh2
    bool lower_order_final =
        true;                     // the last two steps of a run of fewer than 15, UniPC's of any, are of order 2 and 1
    bool euler_at_final = false;  // the last step of DPM-Solver++ is of order 1
    std::string final_sigmas_type = "zero";  // the run ends at σ = 0, else, and with DEIS, at the schedule's smallest σ
    std::optional<double> lambda_min_clipped;  // timesteps whose log(α/σ) is smaller are left out
    // Flows
    std::string flow_spacing = "trailing";
    std::string flow_curve = "none";  // bends the σ of the spacing, which keeps its ends
};

// The manifest's `process` section.
struct Process {
    std::int64_t train_steps = 1000;  // also the most that a run may take
    std::string prediction = "epsilon";
    Sampler sampler;
    // Noise processes
    std::string beta_schedule = "linear";
    double beta_start = 1e-4;
    double beta_end = 0.02;
    std::optional<Array> trained_betas;  // instead of the three fields above
    // Flows: σ' = s σ / (1 + (s - 1) σ) (Esser et al. 2024, equation 23)
    double shift = 1.0;
    double shift_growth = 0.0;             // a run of N steps has the shift s e^(growth · N)
    std::optional<double> shift_terminal;  // stretch the shifted σ so that a run's last one is this
    double sigma_min = 0.001;              // where the spacing "linspace" ends, before the shift

    // "noise" or "flow".
    std::string kind() const;
    // The range of the network's time, from 0.
    double span() const { return kind() == "flow" ? 1.0 : static_cast<double>(train_steps); }
    // β of each training step: Ho et al. 2020 (linear), Rombach et al. 2022 (scaled), Nichol & Dhariwal 2021 (cos).
    Array betas() const;
    // ᾱ_t = Π (1 - β_s) over s ≤ t.
    Array alpha_bar() const;
    // The shift of a run of so many steps.
    double shift_over(std::int64_t steps) const;
};

// A std::invalid_argument names what does not fit.
Process process_from_json(const nlohmann::json& table);

// Refuses a solver that is not known, or that is made for the other kind of process.
void require_fit(const Process& process, const std::string& solver);

// Refuses DDPM whose learned variance the network does not predict.
void require_variance(const Sampler& sampler, bool predicted);

void require_steps(const Process& process, std::int64_t steps);

// As NumPy's: the last point is exact.
Array linspace(double start, double stop, std::int64_t count);

}  // namespace dit_runtime
