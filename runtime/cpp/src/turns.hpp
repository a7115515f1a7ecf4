// A lock that callers get in the order in which they asked for it.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>

namespace dit_runtime {

class Turns {
  public:
    // The caller's turn while this lives.
    class Turn {
      public:
        explicit Turn(Turns& turns) : turns_(turns) {
            std::unique_lock<std::mutex> lock(turns_.mutex_);
            turns_.waiting_.push_back(this);
            turns_.moved_.wait(lock, [this] { return turns_.waiting_.front() == this; });
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
    std::mutex mutex_;
    std::condition_variable moved_;
    std::deque<const Turn*> waiting_;  // the first has its turn
};

}  // namespace dit_runtime
