// A lock that callers get in the order in which they asked for it.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>

#include "call.hpp"
#include "errors.hpp"

namespace dit_runtime {

class Turns {
  public:
    // The caller's turn while this lives. A call that is cancelled while it waits throws Stopped.
    class Turn {
      public:
        explicit Turn(Turns& turns) : turns_(turns) {
            const Stopwatch waiting(&Timing::waiting);
            const auto cancellation = current_call().cancellation;
            const auto stopped = [&] { return cancellation && cancellation->cancelled(); };
            const Cancellation::Hook hook(cancellation, [&turns] { turns.look_again(); });
            std::unique_lock<std::mutex> lock(turns_.mutex_);
            turns_.waiting_.push_back(this);
            turns_.moved_.wait(lock, [&] { return turns_.waiting_.front() == this || stopped(); });
            if (!stopped()) return;
            turns_.waiting_.erase(std::find(turns_.waiting_.begin(), turns_.waiting_.end(), this));
            turns_.moved_.notify_all();
            throw Stopped("cancelled");
        }
        ~Turn() {
            const std::lock_guard<std::mutex> lock(turns_.mutex_);
            turns_.waiting_.pop_front();
            turns_.moved_.notify_all();
        }
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;

      private:
        Turns& turns_;
    };

  private:
    void look_again() {
        const std::lock_guard<std::mutex> lock(mutex_);
        moved_.notify_all();
    }

    std::mutex mutex_;
    std::condition_variable moved_;
    std::deque<const Turn*> waiting_;  // the first has its turn
};

}  // namespace dit_runtime
