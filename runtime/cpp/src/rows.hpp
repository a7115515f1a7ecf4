// How many samples one call of the step stage should have, from its measured time at each batch size.
// Mirrors dit_runtime/serve/rows.py.
#pragma once

#include <functional>
#include <map>
#include <vector>

#include "pipeline.hpp"

namespace dit_runtime {

using Clock = std::function<double()>;        // seconds
using Curve = std::map<std::size_t, double>;  // seconds of a call by its samples
double now();                                 // of a clock that only goes forward
extern const double TOLERANCE;  // time a sample above the least: a larger batch must gain more to be worth its latency

// The seconds of a call of the step stage by its samples, guided where the stage mixes guidance.
//
// Sizes double up to the stage's largest. They end where three sizes in a row have gained nothing, so that a network
// whose curve is flat is not measured at its slowest sizes.
Curve measure(Pipeline& pipe, const Clock& clock = now);

// 1, 2, 4, … and the largest.
std::vector<std::size_t> sizes(std::size_t largest);

// The smallest batch size whose time a sample is within TOLERANCE of the least; 1 on a flat curve.
std::size_t knee(const Curve& curve);

// One of a bundle's sizes: its pipeline, and how many of its samples share a call.
struct Sized {
    // `places` of 0: as many as the curve says.
    Sized(Pipeline& pipe, Curve curve, std::size_t places);

    Pipeline& pipe;
    const Curve curve;
    double weight = 1.0;
    std::size_t places;
    double row;  // seconds
};

}  // namespace dit_runtime
