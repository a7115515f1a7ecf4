// What goes with the call that a thread is making: how another thread stops it, how far it is, and what it measures.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <future>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

namespace dit_runtime {

// A switch that any thread may throw: calls that were made with it end in Stopped.
class Cancellation {
  public:
    void cancel();
    bool cancelled() const { return cancelled_; }

    // Makes `stop` be called when the switch is thrown while this lives; at once where it has been thrown.
    class Hook {
      public:
        Hook(std::shared_ptr<Cancellation> cancellation, std::function<void()> stop);
        ~Hook();  // waits for `stop` where it is being called
        Hook(const Hook&) = delete;
        Hook& operator=(const Hook&) = delete;

      private:
        std::shared_ptr<Cancellation> cancellation_;
        std::list<std::function<void()>>::iterator place_;
    };

  private:
    std::atomic<bool> cancelled_{false};
    std::mutex mutex_;  // for hooks_, and held while they are called
    std::list<std::function<void()>> hooks_;
};

// Seconds of a run, by what they went to.
struct Timing {
    double waiting = 0;      // for other calls of the engines
    double opening = 0;      // engines that were not open
    double before_loop = 0;  // the stages that run once for a prompt, condition or timestep
    double steps = 0;
    double end = 0;  // the decoder
};

// How much of a call is done, from 0 to 1, in units of its own. Several threads may add to it.
class Progress {
  public:
    // One thread at a time calls `report`. Where the units are no bytes, these do not count.
    Progress(bool of_bytes, std::function<void(double)> report) : of_bytes(of_bytes), report_(std::move(report)) {}

    const bool of_bytes;

    void expect(std::uint64_t units) { expected_ += units; }
    void add(std::uint64_t units);

  private:
    const std::function<void(double)> report_;
    std::mutex mutex_;
    std::atomic<std::uint64_t> expected_{0};
    std::uint64_t done_ = 0;
};

// Goes on with work that no call waits for any more. The process waits for it when the main thread ends it, before any
// static object is destroyed, for an engine library makes such objects whenever it works.
void leave(std::future<void> work);

struct Call {
    std::shared_ptr<Cancellation> cancellation = {};
    std::shared_ptr<Progress> progress = {};
    Timing* timing = nullptr;
    void (*leave)(std::future<void> work) = dit_runtime::leave;  // in plugins libdit's
};

// The calling thread's call.
const Call& current_call();

// Makes it the thread's call while this lives.
class CallScope {
  public:
    explicit CallScope(Call call);
    ~CallScope();
    CallScope(const CallScope&) = delete;
    CallScope& operator=(const CallScope&) = delete;

  private:
    Call before_;
};

// Throws Stopped where the thread's call is cancelled.
void check_cancelled();

// For loops over bytes: counts them as done, and throws Stopped where the thread's call is to stop.
void count_bytes(std::uint64_t bytes);

// Adds the seconds of its life to one of the thread's figures, where these are measured.
class Stopwatch {
  public:
    explicit Stopwatch(double Timing::* figure) : figure_(figure) {}
    ~Stopwatch() {
        if (Timing* const timing = current_call().timing)
            timing->*figure_ += std::chrono::duration<double>(Clock::now() - start_).count();
    }
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;

  private:
    using Clock = std::chrono::steady_clock;
    double Timing::* const figure_;
    const Clock::time_point start_ = Clock::now();
};

// Waits until the work is done, or the thread's call is cancelled and leaves it.
void wait_or_leave(std::future<void> work);

// Destroys it in the background.
void destroy_later(std::shared_ptr<void> object);

// The result of what cannot be stopped. Where the thread's call is cancelled it throws Stopped at once: what `make`
// holds goes on in the background, and what it makes is dropped there. So `make` must own all that it uses.
template <typename Make>
auto unless_cancelled(Make make) {
    if (!current_call().cancellation) return make();
    using Made = decltype(make());
    const auto made = std::make_shared<Made>();
    wait_or_leave(std::async(std::launch::async, [place = std::weak_ptr<Made>(made), make = std::move(make)]() mutable {
        const Make own = std::move(make);  // an engine takes a while to close: not in the thread of a later call
        Made result = own();
        if (const auto awaited = place.lock()) *awaited = std::move(result);
    }));
    return std::move(*made);
}

}  // namespace dit_runtime
