// A run of a solver: it waits for each prediction of the network. Mirrors dit_runtime/sampling/solvers/__init__.py.
#pragma once

#include <memory>
#include <string>

#include "denoiser.hpp"
#include "noise.hpp"

namespace dit_runtime {

class Method;

// The evaluations of the network a step.
std::int64_t evaluations(const std::string& solver);

// Every time that a run's network reads, in order; (N,), or (2 N,) where a step evaluates it twice.
Array plan(const Process& process, const std::string& solver, std::int64_t steps, const std::string& spacing = "");

// A run from x_T that draws its noise with `draw`; refuses what does not fit before the first step.
class Solver {
  public:
    Solver(const Process& process, const std::string& solver, std::int64_t steps, Array x, Draw draw, double eta = 0.0,
           const std::string& spacing = "");
    ~Solver();
    Solver(Solver&&) noexcept;
    Solver& operator=(Solver&&) noexcept;

    bool asks() const;                       // for a prediction of (x, t); else x is the result
    const Array& x() const;                  // the latents so far
    double t() const;                        // the time that the network reads
    const Array& x0() const { return x0_; }  // of the last prediction; empty before the first
    void send(const Prediction& prediction);

  private:
    std::string prediction_;
    Array x0_;
    std::unique_ptr<Method> method_;
};

}  // namespace dit_runtime
