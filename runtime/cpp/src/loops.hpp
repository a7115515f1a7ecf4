// The sampling loop with the solver on the host. Mirrors dit_runtime/sampling/loops.py.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "caches.hpp"
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

    const Array& state() const { return keep_ && done_ ? kept_ : solver_.x(); }
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
    Array kept_, x0_;                          // the state with what is kept, and its end; only where something is
    std::vector<float> variance_;              // of the last evaluation
    std::optional<std::vector<float>> guess_;  // the next step's prediction where it needs no network
    std::size_t done_ = 0, rows_ = 0;
};

}  // namespace dit_runtime
