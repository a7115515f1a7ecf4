// reference.npz, one sampling run of PyTorch, and the fingerprint of the stages before the loop; prompts.npz, token ids
// and the fingerprint of what PyTorch's text encoders give for them. Mirrors dit_runtime/verify/reference.py,
// prompts.py.
#pragma once

#include <cstdint>
#include <vector>

#include "npy.hpp"
#include "pipeline.hpp"
#include "start.hpp"

namespace dit_runtime {

inline const char* const REFERENCE = "reference.npz";
inline const char* const PROMPTS = "prompts.npz";
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
    std::vector<float> prediction, conditional, null;  // (S, B, *state); null may be empty where nothing mixes guidance
    std::vector<float> variance;                       // (S, B, *state), or empty where it is not learned
    std::vector<float> fingerprint;                    // (F, FINGERPRINTS)
    std::vector<std::uint8_t> images;  // (B, H, W, 3), of videos (B, F, H, W, 3), or empty without a decoder
    std::vector<std::int64_t> frames;  // (F,) of the videos, those that `images` has; empty: all
    Encoded encoded;                   // of the images: arrays encoded.NAME
    Rows condition, negative;          // B rows and one (or none): arrays condition.NAME and null.NAME

    std::size_t batch() const { return seeds.size(); }
    // What `images` has of pictures or videos, whose shape is (3, H, W) or (3, F, H, W).
    std::vector<std::uint8_t> shown(std::vector<std::uint8_t> pictures, const Shape& shape) const;
};

Reference load_reference(const Pipeline& pipe);

// N rows of the prompt stage's inputs, and PyTorch's answer by port, (N, FINGERPRINTS).
struct PromptReference {
    Rows ids;
    std::map<std::string, std::vector<float>> fingerprints;
};

PromptReference load_prompts(const Pipeline& pipe);

// Projects rows of so many numbers onto a few seeded directions.
class Projection {
  public:
    explicit Projection(std::size_t width);
    std::vector<float> operator()(const std::vector<float>& values, std::size_t rows) const;  // (rows, FINGERPRINTS)

  private:
    std::size_t width_;
    std::vector<float> directions_;  // (width, FINGERPRINTS)
};

// The rows to fingerprint: every value of a single label port, else the reference's condition, then its negative.
Rows fingerprinted(const Manifest& manifest, const Reference& reference);

// Projects what the step reads from stages at one timestep onto a few seeded directions; (rows, FINGERPRINTS).
std::vector<float> fingerprint(Pipeline& pipe, const Rows& conditions, double timestep);

}  // namespace dit_runtime
