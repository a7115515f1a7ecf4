// The sampling loop: with the solver on the host, or as its matrices where the state can stay with the engine. Mirrors
// dit_runtime/sampling/loops.py.
//
// A step that an engine failed in can be gone again in both.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "caches.hpp"
#include "engine.hpp"
#include "solvers.hpp"

namespace dit_runtime {

// Predictions of own conditions, then of negatives -> guided.
using Mix = std::function<std::vector<float>(const std::vector<float>&)>;

// Puts into the state, after so many evaluations, what a run must not change.
using Keep = std::function<void(std::size_t evaluations, Array& state)>;

// It says what each step needs of the network, and calls nothing.
class Trajectory {
  public:
    // Stands before the first step; `groups` are those of each evaluation, none where its prediction is 0. `keep`
    // changes single numbers of the state after each evaluation: solvers work number by number, so that their own state
    // may differ there.
    Trajectory(Solver solver, Array times, std::vector<std::optional<Groups>> groups, Mix mix = {},
               std::unique_ptr<Cache> cache = {}, Keep keep = {});

    const Array& state() const { return keep_ && done_ ? restored_ : solver_.x(); }
    // The end of the path as the last step's prediction has it; empty before the first.
    const Array& x0() const { return keep_ ? x0_ : solver_.x0(); }
    std::size_t done() const { return done_; }
    std::size_t steps() const { return groups_.size(); }
    // The rows that the network evaluated for each sample.
    std::size_t rows() const { return rows_; }
    // What that is when the run has ended; none where the cache decides that step by step.
    std::optional<std::size_t> planned_rows() const;

    // The groups that the next step evaluates; none where it needs no network, or none is left.
    std::optional<Groups> asks() const;
    // Goes the next step with what the network predicts of its groups.
    void tell(Prediction answer);
    // Goes the next step, which needs no network.
    void tell();

  private:
    void advance(const Prediction& prediction);
    void take_guess();
    void require_finite(const std::vector<float>& prediction) const;

    Solver solver_;
    const Array times_;
    const std::vector<std::optional<Groups>> groups_;
    const Mix mix_;
    const std::unique_ptr<Cache> cache_;
    const Keep keep_;
    Array restored_, x0_;                      // the state with what is kept, and its end; only where something is
    std::vector<float> variance_;              // of the last evaluation
    std::optional<std::vector<float>> guess_;  // the next step's prediction where it needs no network
    std::size_t done_ = 0, rows_ = 0;
};

// The loop of the solver's matrices. It goes `size` samples at once; the host queues each step and waits for none that
// nobody looks at.
class MatrixLoop {
  public:
    // What the network reads but the state, of samples from `first` to before `last` at an evaluation; it stays until
    // the next call.
    using Inputs = std::function<std::vector<Input>(std::size_t step, std::size_t first, std::size_t last)>;

    // `step` and `update` are the stages that run there; x is of so many samples.
    MatrixLoop(const std::vector<Matrix>& matrices, Device device, Stage step, Stage update, const std::string& state,
               const Array& x, const Shape& shape, Inputs inputs);

    void advance();
    std::size_t done() const { return done_; }
    const Array& state();  // brings it home
    Array x0() const;      // of the last prediction, where a step is one evaluation; empty before the first

  private:
    struct Part {
        std::size_t first, last;  // samples
        DeviceRows state, previous, prediction;
        std::size_t updated = 0;  // steps; more than those done where a later part failed
    };

    Array home(DeviceRows Part::* rows) const;

    const Device device_;
    const Stage step_, update_;
    const std::string name_;  // of the state
    const Inputs inputs_;
    std::vector<Part> parts_;
    DeviceRows coefficients_;
    std::size_t done_ = 0;
    Array home_;  // empty: not of this step
};

}  // namespace dit_runtime
