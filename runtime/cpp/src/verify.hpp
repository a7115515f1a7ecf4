// Replays reference.npz, PyTorch's own answer, with the engines alone. Mirrors dit_runtime/verify/judge.py; replay.hpp
// has the recorded run.
#pragma once

#include <functional>
#include <map>
#include <optional>
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
    double encoded;     // least PSNR in dB of the encoder's outputs, by their own range
    double pictures;    // least PSNR in dB of the uint8 pictures of the free run
    bool nearest;       // the nearest sample of the free run must keep the limits; else every sample must
};

// The table of facts.json by precision; verify/judge.py gives the reasons.
extern const std::map<std::string, Tolerances> TOLERANCES;
extern const double NOISE_ATOL;
extern const double CONTRAST;  // least standard deviation of a picture, in levels of 255

// The one verdict: a measurement and the limit that it must keep to.
struct Figure {
    std::string stage;   // of the bundle; "sampler" and "run" are no stages of it
    std::string metric;  // with its unit: "prediction, rel-L2"
    double value;
    double limit;                          // infinite: reported, no gate but for NaN
    bool at_least = false;                 // the value must reach the limit, else stay below it
    std::optional<std::size_t> step = {};  // of the run, from 1
    std::string where = {};                // for people

    std::string name() const { return stage + ": " + metric; }
    bool passed() const { return at_least ? value >= limit : value <= limit; }  // false for NaN, limit or none
};

using OnFigure = std::function<void(const Figure& figure)>;

// All figures of a bundle against its references, one by one; the caller decides on `passed`. The stages of sizes other
// than the pipeline's own have the size before their name. Its engines are closed before those of another size open.
void verify(Pipeline& pipe, const OnFigure& on_figure);

}  // namespace dit_runtime
