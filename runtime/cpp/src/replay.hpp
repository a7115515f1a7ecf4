// The recorded run of a reference, evaluated again by the engines. Mirrors dit_runtime/verify/replay.py.
#pragma once

#include <vector>

#include "reference.hpp"
#include "verify.hpp"

namespace dit_runtime {

// Evaluations and steps of the reference's replay that are done, of those that are expected in all sizes.
void count_steps(std::size_t steps, std::size_t expected = 0);

// ||value − reference|| / ||reference||; NaN and inf stay what they are.
double relative_error(const std::vector<float>& value, const float* reference);

// The largest absolute difference; NaN where a number of them is.
double difference(const float* values, const float* others, std::size_t size);

// Evaluates the network at the reference's latents: each step's error is the engine's own.
void teacher_forced(Pipeline& pipe, const Reference& reference, const Tolerances& limits, const OnFigure& on_figure);

// Asks for a row alone and between two others, each with its own timestep, condition and guidance. What the row reads
// from the stages before the loop is made for it alone, too.
void check_step_row(Pipeline& pipe, const Reference& reference, const OnFigure& on_figure);

// Decodes a sample of the reference alone and in a batch with the others.
void check_end_row(Pipeline& pipe, const Reference& reference, const OnFigure& on_figure);

// The whole loop from the same noise, its latents compared after every step; the last, empty where an engine failed.
std::vector<float> free_run(Pipeline& pipe, const Reference& reference, const Tolerances& limits,
                            const OnFigure& on_figure);

}  // namespace dit_runtime
