// A run of OpenVINO that is under way, which another thread may stop.
#pragma once

#include <algorithm>
#include <memory>
#include <mutex>
#include <openvino/openvino.hpp>
#include <vector>

#include "call.hpp"
#include "engine.hpp"
#include "errors.hpp"

namespace dit_runtime {

class Running {
  public:
    explicit Running(const Options& options) : leave_(options.leave) {}

    void start(ov::InferRequest& request) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (stopping_) throw EngineError("cancelled");
        if (std::find(requests_.begin(), requests_.end(), request) == requests_.end()) requests_.push_back(request);
        request.start_async();
    }
    // What `make` makes; where the run is stopped meanwhile, that goes on in the background, and is dropped.
    template <typename Make>
    auto make(const Make& make) {
        const auto cancellation = std::make_shared<Cancellation>();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (stopping_) throw EngineError("cancelled");
            making_ = cancellation;
        }
        const CallScope scope({cancellation, {}, nullptr, leave_});
        try {
            return unless_cancelled(make);
        } catch (const Stopped&) {
            throw EngineError("cancelled");
        }
    }
    void stop() noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
        if (making_) making_->cancel();
        for (ov::InferRequest& request : requests_) try {
                request.cancel();
            } catch (const std::exception&) {  // has ended
            }
    }
    void resume() noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = false;
    }

  private:
    const decltype(Call::leave) leave_;
    std::mutex mutex_;
    bool stopping_ = false;
    std::shared_ptr<Cancellation> making_;    // of what is made, or was
    std::vector<ov::InferRequest> requests_;  // started so far
};

}  // namespace dit_runtime
