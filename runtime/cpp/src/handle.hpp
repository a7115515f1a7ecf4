// The handles behind dit.h, and how each call on one ends: in a status, with a sentence where it failed.
#pragma once

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>

#include "call.hpp"
#include "dit/dit.h"
#include "errors.hpp"
#include "pipeline.hpp"
#include "run.hpp"

struct dit_model {
    explicit dit_model(std::unique_ptr<dit_runtime::Pipeline> open);

    const std::unique_ptr<dit_runtime::Pipeline> pipe;
    const std::string backend;  // of the denoiser
    const std::string note;
    std::atomic<std::size_t> references{1};
};

struct dit_cancellation {
    const std::shared_ptr<dit_runtime::Cancellation> shared = std::make_shared<dit_runtime::Cancellation>();
};

struct dit_pipeline {
    std::atomic<dit_model*> model{nullptr};
};

struct dit_run {
    dit_run(dit_model* of, const dit_runtime::Request& request)
        : model(dit_model_retain(of)), run(*of->pipe, request) {}

    struct Release {
        void operator()(dit_model* model) const { dit_model_release(model); }
    };
    const std::unique_ptr<dit_model, Release> model;
    dit_runtime::Run run;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
};

namespace dit_runtime {

struct TooSmall : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct NotVerified : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Busy {
  public:
    explicit Busy(std::atomic_flag& flag) : flag_(flag), mine(!flag.test_and_set(std::memory_order_acquire)) {}
    ~Busy() {
        if (mine) flag_.clear(std::memory_order_release);
    }
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;

  private:
    std::atomic_flag& flag_;

  public:
    const bool mine;
};

// The sentence of this thread's last call.
std::string& last_message() noexcept;

// Makes it the sentence of a failed call. Without memory for it, the status alone says what happened.
dit_status fail(dit_status status, const char* message) noexcept;

// The status of the exception that is being handled; its sentence is the last message.
dit_status status_of_failure() noexcept;

// Makes the call; no exception passes it.
template <typename Call>
dit_status attempt(const Call& call) noexcept {
    last_message().clear();
    try {
        call();
        return DIT_OK;
    } catch (...) {
        return status_of_failure();
    }
}

// Makes the call on a run unless another one is inside.
template <typename Call>
dit_status guarded(dit_run* run, const Call& call) noexcept {
    if (!run) return fail(DIT_BAD_ARGUMENT, "the run is NULL; make one with dit_run_begin");
    const Busy busy(run->busy);
    return busy.mine ? attempt(call) : fail(DIT_BUSY, "another call on this run has not returned");
}

}  // namespace dit_runtime
