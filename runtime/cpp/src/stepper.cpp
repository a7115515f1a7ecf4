#include "stepper.hpp"

namespace dit_runtime {

Stepper::Stepper(std::function<Array(const Denoise&)> solve) {
    thread_ = std::thread([this, solve = std::move(solve)] {
        try {
            result_ = solve([this](const Array& x, double t) { return ask(x, t); });
        } catch (const Unwound&) {
        } catch (...) {
            error_ = std::current_exception();
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        ended_ = true;
        solving_ = false;
        turn_.notify_all();
    });
    std::unique_lock<std::mutex> lock(mutex_);
    turn_.wait(lock, [this] { return !solving_; });
    if (!error_) return;
    lock.unlock();
    thread_.join();
    std::rethrow_exception(error_);
}

Stepper::~Stepper() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        leaving_ = true;
        solving_ = true;
        turn_.notify_all();
    }
    thread_.join();
}

void Stepper::send(Prediction prediction) {
    prediction_ = std::move(prediction);
    std::unique_lock<std::mutex> lock(mutex_);
    solving_ = true;
    turn_.notify_all();
    turn_.wait(lock, [this] { return !solving_; });
    if (error_) std::rethrow_exception(error_);
}

// On the solver's thread: waits for the prediction.
Prediction Stepper::ask(const Array& x, double t) {
    std::unique_lock<std::mutex> lock(mutex_);
    x_ = &x;
    t_ = t;
    solving_ = false;
    turn_.notify_all();
    turn_.wait(lock, [this] { return solving_; });
    if (leaving_) throw Unwound();
    return std::move(prediction_);
}

}  // namespace dit_runtime
