// One trajectory, a step at a time. Mirrors dit_runtime/run.py.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "memo.hpp"
#include "request.hpp"
#include "solvers.hpp"

namespace dit_runtime {

class Pipeline;

// A run of a request that its pipeline can answer; the pipeline outlives it.
class Run {
  public:
    Run(Pipeline& pipe, const Request& request);

    // Evaluates the network once; true while there is more to do. After an engine's failure it can be called again.
    bool step();
    // The latents after the steps so far, [N, *state]; with one that is the first, the noise.
    const Array& state() const { return solver_.x(); }
    // The latents after all steps, with those that are still to do.
    std::vector<float> latents();
    // Any thread may call it: the next step throws Stopped.
    void cancel() { cancelled_ = true; }

    Pipeline& pipe() const { return pipe_; }  // at the run's size
    std::size_t count() const { return checked_.condition.rows; }
    int steps() const { return static_cast<int>(checked_.timesteps.size()); }

  private:
    void require_going() const;

    Pipeline& pipe_;
    const Checked checked_;
    const OnStep on_step_;
    Solver solver_;
    std::unique_ptr<Memo> memo_;
    int done_ = 0;
    std::atomic<bool> cancelled_{false};
};

}  // namespace dit_runtime
