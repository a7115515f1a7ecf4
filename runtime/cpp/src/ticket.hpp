// A request in the batcher: its place in the line, its result to come, and what it cost.
// Mirrors dit_runtime/serve/ticket.py.
#pragma once

#include <atomic>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <vector>

#include "errors.hpp"
#include "rows.hpp"
#include "run.hpp"
#include "scheduler.hpp"

namespace dit_runtime {

// Called in the batcher's thread after each of a request's steps: evaluations done, and evaluations in all. It must
// return at once and throw nothing.
using Listener = std::function<void(int done, int evaluations)>;

// The request could not be finished by its deadline, or others could not because of it: Python's Busy.
struct Overloaded : std::runtime_error {
    explicit Overloaded(double retry_after);
    const double retry_after;  // seconds
};

// The deadline passed before the request was finished.
struct Late : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The batcher takes no more requests.
struct Closed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Seconds, and the batches that a request was in.
struct Stats {
    double queue = 0;       // until it started
    double conditions = 0;  // checks, prompts, and the stages before the loop
    double steps = 0;       // in calls of the step stage
    double decode = 0;
    double total = 0;  // from arrival to result
    std::size_t calls = 0;
    std::size_t batched = 0;  // samples in these calls, its own among them

    // The mean number of samples in its calls.
    double batch() const { return calls ? static_cast<double>(batched) / static_cast<double>(calls) : 0.0; }
};

// What a request drew: pictures [N, H, W, 3], or where it asked for them the latents, [N, *state].
struct Drawn {
    std::vector<std::uint8_t> pictures;
    std::vector<float> latents;
};

// What `Batcher::submit` returns.
class Ticket : public Job {
  public:
    // Leaves the batch before its next call; any thread may call this.
    void cancel() { cancelled_ = true; }
    // Waits for the result; throws what went wrong, Late, or Stopped after `cancel`.
    const Drawn& result() { return future_.get(); }
    // Whether the result, or what went wrong, is there within so many seconds.
    bool wait(double seconds) const {
        return future_.wait_for(std::chrono::duration<double>(seconds)) == std::future_status::ready;
    }
    int done() const { return done_; }  // evaluations
    int evaluations() const { return evaluations_; }
    std::size_t count() const { return static_cast<std::size_t>(samples); }  // pictures
    const Manifest& manifest() const { return sized_->pipe.manifest; }       // at its size
    // Of a request that has ended.
    const Stats& stats() const { return stats_; }

  private:
    friend class Batcher;

    Request request_;
    Sized* sized_ = nullptr;
    int evaluations_ = 0;
    std::size_t rows_ = 0;  // of a sample, evaluations times groups, before the run has started
    bool latents_ = false;
    Listener listener_;
    std::function<void()> ended_;
    Stats stats_;
    std::atomic<int> done_{0};
    std::atomic<bool> cancelled_{false};
    std::unique_ptr<Run> run_;
    std::optional<Ask> ask_;
    std::promise<Drawn> promise_;
    std::shared_future<Drawn> future_ = promise_.get_future().share();
};

}  // namespace dit_runtime
