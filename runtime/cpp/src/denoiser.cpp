#include "denoiser.hpp"

#include <algorithm>

namespace dit_runtime {

Estimate estimate(const std::string& prediction, const Array& x, const Prediction& output, const Level& level) {
    const double alpha = level.alpha, sigma = level.sigma;
    const Array values(output.prediction.begin(), output.prediction.end());
    Estimate made{Array(x.size()), Array(x.size()), {output.variance.begin(), output.variance.end()}};
    for (std::size_t i = 0; i < x.size(); ++i) {
        if (prediction == "epsilon") {
            made.x0[i] = (x[i] - sigma * values[i]) / alpha;
            made.epsilon[i] = values[i];
        } else if (prediction == "sample") {
            made.x0[i] = values[i];
            made.epsilon[i] = (x[i] - alpha * values[i]) / sigma;
        } else if (prediction == "v_prediction") {
            made.x0[i] = alpha * x[i] - sigma * values[i];
            made.epsilon[i] = alpha * values[i] + sigma * x[i];
        } else {
            made.x0[i] = x[i] - sigma * values[i];
            made.epsilon[i] = x[i] + alpha * values[i];
        }
    }
    return made;
}

void clip(Array& x0, const Sampler& sampler) {
    if (!sampler.clip_sample) return;
    for (double& value : x0) value = std::clamp(value, -sampler.clip_sample_range, sampler.clip_sample_range);
}

}  // namespace dit_runtime
