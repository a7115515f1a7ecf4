// reference.npz, PyTorch's own answer, and the fingerprint of what the stages before the loop give.
// Mirrors dit_runtime/verify/reference.py.
#pragma once

#include <cstdint>
#include <vector>

#include "npy.hpp"
#include "pipeline.hpp"

namespace dit_runtime {

inline const char* const REFERENCE = "reference.npz";
// As facts.json has them; not for use before main.
extern const std::size_t FINGERPRINTS;  // numbers of each condition
extern const std::uint64_t FINGERPRINT_SEED;

// S steps (evaluations of the network) of a run of B samples.
struct Reference {
    Array betas;                                       // (T,)
    Array timesteps;                                   // (S,)
    std::vector<std::int64_t> seeds;                   // (B,)
    std::vector<float> guidance;                       // (B,)
    std::vector<float> latents;                        // (S + 1, B, *state)
    std::vector<float> prediction, conditional, null;  // (S, B, *state); null is empty where nothing mixes guidance
    std::vector<float> variance;                       // (S, B, *state), or empty where it is not learned
    std::vector<float> fingerprint;                    // (F, FINGERPRINTS)
    std::vector<std::uint8_t> images;                  // (B, H, W, 3), or empty without a decoder
    Condition own, away;                               // B rows and one: arrays condition.NAME and null.NAME

    std::size_t batch() const { return seeds.size(); }
};

Reference load_reference(const Pipeline& pipe);

// What is fingerprinted: every value of a lone label, else the reference's own rows and what guidance leads away from.
Condition fingerprinted(const Manifest& manifest, const Reference& reference);

// What the step reads from stages at one timestep, by condition, projected onto a few seeded random directions.
std::vector<float> fingerprint(Pipeline& pipe, const Condition& conditions, double timestep);

}  // namespace dit_runtime
