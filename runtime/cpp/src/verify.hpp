// Replays reference.npz, PyTorch's own answer, with the engines alone. Mirrors
// dit_runtime/verify/judge.py and replay.py.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "npy.hpp"
#include "pipeline.hpp"

namespace dit_runtime {

// Largest errors at one precision; relative L2 against the reference's norm unless said otherwise.
struct Tolerances {
    double conditioner;
    double prediction;  // one teacher-forced evaluation without guidance
    double guided;      // the same with guidance
    double latents;     // after each step of the free run
    double pictures;    // least PSNR in dB of the uint8 pictures of the free run
};

// By precision, as facts.json has them; their reasons stand in verify/judge.py.
extern const std::map<std::string, Tolerances> TOLERANCES;
extern const double NOISE_ATOL;
extern const double CONTRAST;  // least standard deviation of a picture, in levels of 255

// One gate: what was measured where, and what it must keep to.
struct Check {
    std::string name;
    double value, limit;
    bool at_least = false;  // the value must reach the limit, else stay below it
    std::string where;

    bool passed() const { return at_least ? value >= limit : value <= limit; }  // false for NaN
};

using OnCheck = std::function<void(const Check& check)>;

// All checks of a bundle against its reference, one by one; the caller decides on `passed`.
void verify(Pipeline& pipe, const OnCheck& on_check);

}  // namespace dit_runtime
