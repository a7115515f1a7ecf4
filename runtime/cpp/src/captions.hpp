// Captions, as a text encoder embeds them, and made-up ones by which a bundle is verified without a text encoder.
// Mirrors dit_runtime/captions.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace dit_runtime {

inline constexpr std::int64_t EXAMPLES =
    4;  // made-up captions 0 … 3; number 4 is the one that guidance leads away from

struct Captions {
    std::size_t count = 0;
    std::vector<float> embeddings;  // (N, L, C)
    std::vector<float> mask;        // (N, L): 1 where the caption has a token, else 0
};

// Captions as somebody gives them; the numbers stay theirs.
struct Given {
    std::size_t count = 0, tokens = 0;  // N, and L of these
    const float* embeddings = nullptr;
    const float* mask = nullptr;  // NULL: every token counts
};

// Made-up captions by their numbers, the same everywhere; the higher its number, the fewer tokens one has.
Captions examples(const std::vector<std::int64_t>& numbers, const Shape& shape);

// What the denoiser reads of captions in every step.
struct Context {
    std::size_t count = 0;
    std::vector<float> vectors;  // (N, M, D): keys and values for each block
    std::vector<float> mask;     // (N, L): added to their scores
};

// The denoiser's inputs that do not change from step to step; none where there are classes.
class Contexts {
  public:
    Contexts() = default;
    // `null` is what guidance leads away from: one for all, or one a sample; empty without guidance.
    explicit Contexts(Context own, Context null = {}) : own_(std::move(own)), null_(std::move(null)) {}

    // [G, B, M, D] and [G, B, L] for the samples from `first` to before `last`: their own first. Those of the last call
    // are kept, XL/2's 62 MB a sample: a run that fits the engine always asks for the same.
    const Context& operator()(std::size_t first, std::size_t last);

  private:
    Context own_, null_, stacked_;
    std::size_t first_ = 0, last_ = 0;
};

// Captions as a bundle takes them: (N, L, C), shorter ones filled up; without a mask every token counts.
Captions fitting(const Given& captions, const Shape& shape, const std::string& what);

}  // namespace dit_runtime
