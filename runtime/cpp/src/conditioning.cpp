#include "conditioning.hpp"

#include <algorithm>

#include "errors.hpp"

namespace dit_runtime {
namespace {

// As np.unique(values, return_inverse=True).
template <typename T>
std::vector<std::size_t> unique(std::vector<T>& values) {
    const std::vector<T> all = values;
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    std::vector<std::size_t> inverse;
    for (const T& value : all)
        inverse.push_back(
            static_cast<std::size_t>(std::lower_bound(values.begin(), values.end(), value) - values.begin()));
    return inverse;
}

}  // namespace

Table::Table(Conditioner conditioner, const Array& timesteps, const std::vector<std::int64_t>& labels,
             std::optional<std::int64_t> null_label, std::size_t row_size, std::size_t max_rows, std::size_t budget)
    : conditioner_(std::move(conditioner)),
      labels_(labels),
      guided_(null_label.has_value()),
      row_size_(row_size),
      chunk_(max_rows) {
    for (const double t : timesteps) times_.push_back(static_cast<float>(t));
    time_of_step_ = unique(times_);
    if (null_label) labels_.push_back(*null_label);
    label_of_row_ = unique(labels_);
    window_ = std::max<std::size_t>(1, budget / (row_size * sizeof(float) * labels_.size()));
}

std::vector<float> Table::operator()(std::size_t step, std::size_t first, std::size_t last) {
    const std::size_t time = time_of_step_.at(step);
    if (!rows_.count(time)) fill(step);
    const std::vector<float>& rows = rows_.at(time);
    std::vector<float> chosen;
    chosen.reserve((last - first) * row_size_ * (guided_ ? 2 : 1));
    const auto append = [&](std::size_t label) {
        const auto row = rows.begin() + static_cast<std::ptrdiff_t>(label * row_size_);
        chosen.insert(chosen.end(), row, row + static_cast<std::ptrdiff_t>(row_size_));
    };
    for (std::size_t sample = first; sample < last; ++sample) append(label_of_row_.at(sample));
    if (guided_)
        for (std::size_t sample = first; sample < last; ++sample) append(label_of_row_.back());
    return chosen;
}

// Replaces the window by the timesteps from `step` on.
void Table::fill(std::size_t step) {
    std::vector<std::size_t> times;
    for (std::size_t next = step; next < time_of_step_.size() && times.size() < window_; ++next)
        if (std::find(times.begin(), times.end(), time_of_step_[next]) == times.end())
            times.push_back(time_of_step_[next]);
    rows_.clear();
    for (const std::size_t time : times) rows_[time].reserve(labels_.size() * row_size_);
    const std::size_t pairs = times.size() * labels_.size();
    for (std::size_t first = 0; first < pairs; first += chunk_) {
        std::vector<float> part_times;
        std::vector<std::int64_t> part_labels;
        for (std::size_t pair = first; pair < std::min(first + chunk_, pairs); ++pair) {
            part_times.push_back(times_[times[pair / labels_.size()]]);
            part_labels.push_back(labels_[pair % labels_.size()]);
        }
        const std::vector<float> part = conditioner_(part_times, part_labels);
        if (part.size() != part_times.size() * row_size_)
            throw EngineError(
                text("the conditioner gave ", part.size(), " numbers, expected ", part_times.size() * row_size_));
        for (std::size_t row = 0; row < part_times.size(); ++row) {
            const auto from = part.begin() + static_cast<std::ptrdiff_t>(row * row_size_);
            std::vector<float>& to = rows_[times[(first + row) / labels_.size()]];
            to.insert(to.end(), from, from + static_cast<std::ptrdiff_t>(row_size_));
        }
    }
}

}  // namespace dit_runtime
