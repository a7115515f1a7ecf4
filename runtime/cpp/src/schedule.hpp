// The steps of a run: the noise levels that each one leads from and to.
// Mirrors dit_runtime/sampling/schedule.py line by line.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "process.hpp"

namespace dit_runtime {

// As facts.json has them; not for use before main.
extern const std::vector<std::string> MULTISTEP;
extern const double FIRST_ANGLE, SECOND_ANGLE;  // of SCM: its authors' values, the second in a run of two steps
extern const double LAST_STEP;                  // of the SDE, in σ: its authors' value
extern const double LARGEST;                    // σ of a flow with a method that needs some signal: diffusers' value

// A point of the process, x = α x₀ + σ ε, and the time that the network reads there.
struct Level {
    double time;  // a training step, or a flow's σ, or what flow_times makes of it
    double alpha;
    double sigma;

    // λ = log(α/σ), half the logarithm of the signal-to-noise ratio; ∞ without noise, -∞ without signal.
    double log_snr() const;
};

struct Step {
    Level now, after;
};

// A run's steps, noisiest first. The spacing is a name, or a list of times in words: "999, 640, 300"; an empty one is
// the solver's default.
std::vector<Step> make_schedule(const Process& process, const std::string& solver, std::int64_t steps,
                                const std::string& spacing = "");

// The σ before each step of a flow and a last 0; (N + 1,), each one exact in float.
//
// "trailing" is 1, 1 - 1/N … 1/N, as SiT and diffusers' Flux pipeline have it; "linspace" ends at sigma_min, as in
// diffusers' SD3 pipeline. "discrete" is "trailing" times 1 - 1/T of T training steps, as in diffusers' multistep
// schedulers. "integer" is training steps from T to 1, each rounded down, over T, as in diffusers' CogView4 pipeline.
// UniPC's "discrete" is 1/T above. The SDE's are even down to LAST_STEP; SCM's come from angles φ,
// σ = sin φ / (sin φ + cos φ). Then σ' = s σ / (1 + (s - 1) σ), where s = shift e^(shift_growth · N), and
// 1 - σ'' = (1 - σ') (1 - shift_terminal) / (1 - σ' of the last step). A curve replaces all but both ends; times
// that are listed are σ as it is.
Array sigmas(const Process& process, const std::string& solver, std::int64_t steps, const std::string& spacing = "");

// What the network reads at each σ of a flow: σ; ⌊T σ⌋ / T for "discrete"; σ before the shift for "integer".
Array flow_times(const Process& process, const std::string& solver, std::int64_t steps,
                 const std::string& spacing = "");

// The times that a spacing lists; none where it is a name.
Array listed(const std::string& spacing);

// The training steps that a run of a noise process visits, descending.
//
// "stride" and "respaced" are Nichol & Dhariwal 2021's (there "ddimN" and "N"); "leading", "trailing" and "linspace"
// are those of Lin et al. 2023, table 2. DPM-Solver++ divides the time into one interval a step, so its "leading" and
// "linspace" take N + 1 points and leave the last, t = 0, out; so do all multistep solvers. Curves bend σ/α between the
// ends of the training steps, and the network reads the step below: of "karras" the nearest one, but for DPM-Solver++
// on cosine's betas, as in diffusers.
std::vector<std::int64_t> timesteps(const Process& process, const std::string& solver, std::int64_t steps,
                                    const std::string& spacing = "");

}  // namespace dit_runtime
