// The handles behind dit.h, and how each call on one ends: in a status, with a sentence where it failed.
#pragma once

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>

#include "dit/dit.h"
#include "pipeline.hpp"
#include "run.hpp"

struct dit_pipeline {
    std::unique_ptr<dit_runtime::Pipeline> open;
    std::string backend;  // of the denoiser
    std::string note;
    std::string message;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
};

struct dit_run {
    dit_pipeline* pipe;
    dit_runtime::Run run;
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

// The status of the exception that is being handled; the pipeline keeps its sentence.
dit_status status_of_failure(dit_pipeline& pipe) noexcept;

// Makes the call unless another one is inside; no exception passes it.
template <typename Call>
dit_status guarded(dit_pipeline* pipe, const Call& call) noexcept {
    if (!pipe) return DIT_BAD_ARGUMENT;
    const Busy busy(pipe->busy);
    if (!busy.mine) return DIT_BUSY;
    pipe->message.clear();
    try {
        call();
        return DIT_OK;
    } catch (...) {
        return status_of_failure(*pipe);
    }
}

// The bundle that is open; refuses where there is none.
Pipeline& opened(dit_pipeline* pipe);

}  // namespace dit_runtime
