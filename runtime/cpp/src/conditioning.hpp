// The conditioning table: each unique (t, label) of a run goes through the conditioner once.
// Mirrors dit_runtime/conditioning.py.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <vector>

#include "schedule.hpp"

namespace dit_runtime {

// (N,), (N,) -> [N, K, D].
using Conditioner =
    std::function<std::vector<float>(const std::vector<float>& timesteps, const std::vector<std::int64_t>& labels)>;

// A step's rows, [G, B, K, D], for the samples from `first` to before `last`.
using Rows = std::function<std::vector<float>(std::size_t first, std::size_t last)>;

inline constexpr std::size_t TABLE_BYTES = 256u << 20;  // of XL/2's 783 kB a (t, label) that is 342

// Rows for the run's steps in windows that stay below the budget, whatever the number of steps and labels.
class Table {
  public:
    // A row has `row_size` numbers; the conditioner takes `max_rows` at a time.
    Table(Conditioner conditioner, const Array& timesteps, const std::vector<std::int64_t>& labels,
          std::optional<std::int64_t> null_label, std::size_t row_size, std::size_t max_rows,
          std::size_t budget = TABLE_BYTES);

    // [G, B, K, D] for the samples from `first` to before `last` at a step: their labels first, then the null label.
    std::vector<float> operator()(std::size_t step, std::size_t first, std::size_t last);

    std::size_t held() const { return rows_.size() * labels_.size() * row_size_ * sizeof(float); }

  private:
    void fill(std::size_t step);

    Conditioner conditioner_;
    std::vector<float> times_;  // unique, ascending
    std::vector<std::size_t> time_of_step_;
    std::vector<std::int64_t> labels_;  // unique, ascending
    std::vector<std::size_t> label_of_row_;
    bool guided_;
    std::size_t row_size_, chunk_;
    std::size_t window_;                              // timesteps held at a time
    std::map<std::size_t, std::vector<float>> rows_;  // by timestep: (labels, K, D)
};

}  // namespace dit_runtime
