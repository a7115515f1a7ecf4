// A solver that waits for each prediction, as Python's generators do.
#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "solvers.hpp"

namespace dit_runtime {

// Solvers call for predictions; a service wants to bring them. So the solver has a thread of its own, and of the two
// threads one runs at a time: engines and callbacks stay with the caller's.
class Stepper {
  public:
    // `solve` is a solver with all but its Denoise; it runs up to its first call, or throws what it refuses.
    explicit Stepper(std::function<Array(const Denoise&)> solve);
    ~Stepper();  // a solver that waits is unwound
    Stepper(const Stepper&) = delete;
    Stepper& operator=(const Stepper&) = delete;

    bool asks() const { return !ended_; }  // for a prediction of (x, t); else x is the result
    const Array& x() const { return ended_ ? result_ : *x_; }
    double t() const { return t_; }
    void send(Prediction prediction);

  private:
    struct Unwound {};

    Prediction ask(const Array& x, double t);

    std::mutex mutex_;
    std::condition_variable turn_;
    bool solving_ = true, leaving_ = false, ended_ = false;
    const Array* x_ = nullptr;
    double t_ = 0;
    Prediction prediction_;
    Array result_;
    std::exception_ptr error_;
    std::thread thread_;
};

}  // namespace dit_runtime
