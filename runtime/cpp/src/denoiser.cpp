#include "denoiser.hpp"

#include <algorithm>

namespace dit_runtime {

Estimate estimate(const std::string& prediction, const Array& x, const Prediction& output, const Level& level) {
    const double alpha = level.alpha, sigma = level.sigma;
    Estimate made{Array(x.size()), Array(x.size()), {output.variance.begin(), output.variance.end()}};
    // Without the branches and the checked accesses of vectors inside, compilers make vector code of these loops.
    const float* const values = output.prediction.data();
    const double* const state = x.data();
    double *const x0 = made.x0.data(), *const epsilon = made.epsilon.data();
    const auto each = [&](const auto& step) {
        for (std::size_t i = 0; i < x.size(); ++i) step(i, static_cast<double>(values[i]));
    };
    if (prediction == "epsilon") {
        each([=](std::size_t i, double value) {
            x0[i] = (state[i] - sigma * value) / alpha;
            epsilon[i] = value;
        });
    } else if (prediction == "sample") {
        each([=](std::size_t i, double value) {
            x0[i] = value;
            epsilon[i] = (state[i] - alpha * value) / sigma;
        });
    } else if (prediction == "v_prediction") {
        each([=](std::size_t i, double value) {
            x0[i] = alpha * state[i] - sigma * value;
            epsilon[i] = alpha * value + sigma * state[i];
        });
    } else {
        each([=](std::size_t i, double value) {
            x0[i] = state[i] - sigma * value;
            epsilon[i] = state[i] + alpha * value;
        });
    }
    return made;
}

void clip(Array& x0, const Sampler& sampler) {
    if (!sampler.clip_sample) return;
    for (double& value : x0) value = std::clamp(value, -sampler.clip_sample_range, sampler.clip_sample_range);
}

}  // namespace dit_runtime
