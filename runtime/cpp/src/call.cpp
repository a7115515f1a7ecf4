#include "call.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "errors.hpp"

namespace dit_runtime {
namespace {

Call& own_call() {
    static thread_local Call call;
    return call;
}

// Work that no call waits for any more.
class Left {
  public:
    ~Left() { wait(); }
    void add(std::future<void> work) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto done = [](const std::future<void>& other) {
            return other.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
        };
        work_.erase(std::remove_if(work_.begin(), work_.end(), done), work_.end());
        work_.push_back(std::move(work));
    }
    void wait() {
        for (std::vector<std::future<void>> last; !(last = taken()).empty();) last.clear();  // which may leave more
    }

  private:
    std::vector<std::future<void>> taken() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return std::exchange(work_, {});
    }

    std::mutex mutex_;
    std::vector<std::future<void>> work_;
};

Left& left() {
    static Left all;
    return all;
}

// A thread's objects are destroyed before any static one. This is made in the thread that loads the library, which is
// the main thread of most programs.
struct AtEnd {
    ~AtEnd() { left().wait(); }
};
thread_local AtEnd at_end;
[[maybe_unused]] const AtEnd* const made = (static_cast<void>(left()), &at_end);

}  // namespace

void Cancellation::cancel() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (cancelled_.exchange(true)) return;
    for (const auto& stop : hooks_) stop();
}

Cancellation::Hook::Hook(std::shared_ptr<Cancellation> cancellation, std::function<void()> stop)
    : cancellation_(std::move(cancellation)) {
    if (!cancellation_) return;
    const std::lock_guard<std::mutex> lock(cancellation_->mutex_);
    if (cancellation_->cancelled()) stop();
    place_ = cancellation_->hooks_.insert(cancellation_->hooks_.end(), std::move(stop));
}

Cancellation::Hook::~Hook() {
    if (!cancellation_) return;
    const std::lock_guard<std::mutex> lock(cancellation_->mutex_);
    cancellation_->hooks_.erase(place_);
}

void Progress::add(std::uint64_t units) {
    const std::lock_guard<std::mutex> lock(mutex_);
    done_ += units;
    const std::uint64_t expected = std::max<std::uint64_t>(expected_, 1);
    report_(static_cast<double>(std::min(done_, expected)) / static_cast<double>(expected));
}

const Call& current_call() { return own_call(); }

CallScope::CallScope(Call call) : before_(std::exchange(own_call(), std::move(call))) {}

CallScope::~CallScope() { own_call() = std::move(before_); }

void check_cancelled() {
    const auto& cancellation = current_call().cancellation;
    if (cancellation && cancellation->cancelled()) throw Stopped("cancelled");
}

void count_bytes(std::uint64_t bytes) {
    check_cancelled();
    if (const auto& progress = current_call().progress; progress && progress->of_bytes) progress->add(bytes);
}

void leave(std::future<void> work) { left().add(std::move(work)); }

void destroy_later(std::shared_ptr<void> object) {
    leave(std::async(std::launch::async, [object = std::move(object)]() mutable { object.reset(); }));
}

void wait_or_leave(std::future<void> work) {
    while (work.wait_for(std::chrono::milliseconds(5)) != std::future_status::ready) {
        if (!current_call().cancellation->cancelled()) continue;
        current_call().leave(std::move(work));
        throw Stopped("cancelled");
    }
    work.get();
}

}  // namespace dit_runtime
