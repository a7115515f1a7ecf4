#include "start.hpp"

#include <algorithm>
#include <cmath>

#include "errors.hpp"
#include "facts.hpp"

namespace dit_runtime {

std::size_t first_step(std::int64_t steps, std::optional<double> strength) {
    const double share = strength.value_or(default_strength()), all = static_cast<double>(steps);
    if (!(share > 0 && share <= 1))
        throw UsageError(text("strength is ", share, "; expected a number above 0, up to 1"));
    const auto first = static_cast<std::size_t>(std::max(all - std::min(all * share, all), 0.0));
    if (first == static_cast<std::size_t>(steps))
        throw UsageError(
            text("strength is ", share, "; of ", steps, " steps it leaves none: take more of one of them"));
    return first;
}

Start::Start(const Encoded& encoded, std::size_t samples, const Shape& state, const Draw& draw,
             std::vector<Level> levels)
    : levels_(std::move(levels)), row_(count(state)), area_(static_cast<std::size_t>(state.at(1) * state.at(2))) {
    const std::vector<float>& mean = encoded.at(MEAN);
    const std::size_t size = samples * row_;
    for (std::size_t i = 0; i < size; ++i) latents_.push_back(static_cast<double>(mean[i % mean.size()]));
    if (const auto entry = encoded.find(LOGVAR); entry != encoded.end()) {
        const std::vector<float>&logvar = entry->second, z = draw(size);
        for (std::size_t i = 0; i < size; ++i)
            latents_[i] += std::exp(0.5 * static_cast<double>(logvar[i % logvar.size()])) * static_cast<double>(z[i]);
    }
    const std::vector<float> noise = draw(size);
    noise_.assign(noise.begin(), noise.end());
    levels_.push_back({0.0, 1.0, 0.0});  // clean
}

Array Start::at(std::size_t evaluations) const {
    const Level& level = levels_.at(evaluations);
    Array noisy(latents_.size());
    for (std::size_t i = 0; i < noisy.size(); ++i) noisy[i] = level.alpha * latents_[i] + level.sigma * noise_[i];
    return noisy;
}

void Start::keep(std::size_t evaluations, Array& state, const std::vector<bool>& mask) const {
    const Array noisy = at(evaluations);
    for (std::size_t i = 0; i < state.size(); ++i)
        if (!mask[(i / row_ * area_ + i % area_) % mask.size()]) state[i] = noisy[i];
}

}  // namespace dit_runtime
