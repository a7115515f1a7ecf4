// A run of a solver: it waits for each prediction of the network. Mirrors dit_runtime/sampling/solvers/__init__.py.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "denoiser.hpp"
#include "noise.hpp"

namespace dit_runtime {

class Method;

// The evaluations of the network a step.
std::int64_t evaluations(const std::string& solver);

// Every time that a run's network reads, in order; (N,), or (2 N,) where a step evaluates it twice.
Array plan(const Process& process, const std::string& solver, std::int64_t steps, const std::string& spacing = "");

// The level at which each evaluation reads the state, of a run that leaves out the `first` steps.
std::vector<Level> levels(const Process& process, const std::string& solver, std::int64_t steps,
                          const std::string& spacing = "", std::size_t first = 0);

// A run from x that draws its noise with `draw`; refuses what does not fit before the first step. It leaves out the
// `first` steps; whether a run is short is a matter of all of them, as in diffusers.
class Solver {
  public:
    Solver(const Process& process, const std::string& solver, std::int64_t steps, Array x, Draw draw, double eta = 0.0,
           const std::string& spacing = "", std::size_t first = 0);
    ~Solver();
    Solver(Solver&&) noexcept;
    Solver& operator=(Solver&&) noexcept;

    bool asks() const;                       // for a prediction of (x, t); else x is the result
    const Array& x() const;                  // the latents so far
    double t() const;                        // the time that the network reads
    const Array& x0() const { return x0_; }  // of the last prediction; empty before the first
    void send(const Prediction& prediction);
    // The end of the path from this state at the solver's level, as the prediction has it.
    Array end(const Array& state, const Prediction& prediction) const;

  private:
    std::string prediction_;
    Array x0_;
    std::unique_ptr<Method> method_;
};

using Matrix = std::array<std::array<double, 3>, 2>;

// A run as a matrix M an evaluation, (memory', x') = M (x, prediction, memory).
//
// The memory is the last x₀, or the last velocity of a solver that evaluates twice a step. Whether there are such
// matrices, and which, comes from the solver alone: it steps a few numbers, and where three coefficients do not
// explain all that it makes of them (it clips, draws noise or looks further back), there are none.
std::optional<std::vector<Matrix>> linear(const Process& process, const std::string& solver, std::int64_t steps,
                                          double eta = 0.0, const std::string& spacing = "", std::size_t first = 0);

}  // namespace dit_runtime
