// The stages before the loop: each runs once for each distinct timestep, row of conditions, or pair of both that it
// depends on. Mirrors dit_runtime/conditions/memo.py.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "condition.hpp"
#include "guidance.hpp"
#include "resident.hpp"

namespace dit_runtime {

// A stage's tensors for so many rows, by name.
using RunStage = std::function<std::map<std::string, std::vector<float>>(
    const Stage& stage, const std::vector<Input>& inputs, std::size_t rows)>;

// A row of a tensor that a stage gave; several runs may hold it.
using SharedRow = std::shared_ptr<const float>;

// A stage's tensors for so many rows, by name, each row by itself.
using RunRows = std::function<std::map<std::string, std::vector<SharedRow>>(
    const Stage& stage, const std::vector<Input>& inputs, std::size_t rows)>;

// The rows of a call are parts of one array.
RunRows in_rows(RunStage run);

extern const std::size_t MEMO_BYTES;  // as facts.json has it; of XL/2's 783 kB a (t, label) that is 342

// The step's inputs for a run's evaluations, in windows of timesteps that stay below the budget. What depends on no
// timestep is held for the whole run.
class Memo {
  public:
    // `negative` is what guidance leads away from: no row without guidance, one for all, or one for each of
    // `condition`. With a device, the inputs of the step are there; engines that can write there do.
    Memo(const Manifest& manifest, RunRows run, const Array& timesteps, const Rows& condition,
         const Rows& negative = {}, std::size_t budget = MEMO_BYTES, std::optional<Device> device = {});
    Memo(const Manifest& manifest, RunStage run, const Array& timesteps, const Rows& condition,
         const Rows& negative = {}, std::size_t budget = MEMO_BYTES, std::optional<Device> device = {})
        : Memo(manifest, in_rows(std::move(run)), timesteps, condition, negative, budget, std::move(device)) {}

    // [G, B, ...] for the samples from `first` to before `last` at an evaluation, by tensor; they stay until the next
    // call. Samples that are apart are twice as many: each one's own condition, then each one's negative. Those without
    // a timestep are stacked once for the same samples (62 MB a caption in XL/2).
    const Arrays& operator()(std::size_t step, std::size_t first, std::size_t last, Groups groups = Groups::BOTH);
    // Writes the rows of one tensor into [G, `batch`, ...], from sample `begin` on: so that runs which share a call are
    // stacked in one copy.
    void write(std::size_t step, std::size_t first, std::size_t last, Groups groups, const TensorSpec& spec, Tensor& to,
               std::size_t begin, std::size_t batch);
    // Computes what an evaluation reads, unless it is there.
    void fill(std::size_t step);

  private:
    using Pairs = std::vector<std::pair<std::size_t, std::size_t>>;  // a timestep's number and a row

    // The outputs of a stage: rows by timestep of the window and by value of the conditions that it depends on.
    struct Held {
        const Stage* stage;
        bool timed;
        std::vector<std::string> ports;     // the condition ports that it depends on
        std::vector<std::size_t> numbers;   // of each row's value among the distinct ones
        std::vector<std::size_t> examples;  // by number: a row that has the value
        std::map<std::string, std::vector<SharedRow>> tensors;
        std::map<std::string, DeviceRows> resident;  // those of them that are on the device instead
    };

    Pairs pairs(std::size_t step, std::size_t first, std::size_t last, Groups groups) const;
    void replace_window(std::size_t step);
    void run(Held& held, const Pairs& pairs);
    void fill_device(Held& held, const Pairs& pairs);
    std::vector<Tensor> read(const Stage& stage, const Pairs& pairs) const;
    const Held* giver(const std::string& tensor) const;
    bool timed(const std::string& tensor) const;
    Tensor gather(const TensorSpec& spec, const Pairs& pairs) const;
    Tensor choose(const TensorSpec& spec, const Pairs& pairs);
    const DeviceRows& send(const TensorSpec& spec);
    std::size_t place(const Held& source, std::size_t time, std::size_t row) const;
    template <typename Take>
    void each_row(const TensorSpec& spec, const Pairs& pairs, const Take& take) const;

    const Manifest& manifest_;
    RunRows run_;
    std::optional<Device> device_;
    std::map<std::string, DeviceRows> sent_;  // what no stage before the loop gives, and no step changes
    Rows rows_;                               // condition, then negative
    std::size_t condition_rows_, negative_rows_;
    std::vector<float> times_;  // distinct, ascending
    std::vector<std::size_t> time_of_step_;
    std::size_t window_ = 0;                     // timesteps held at a time
    std::map<std::size_t, std::size_t> places_;  // in the window, by timestep
    std::vector<Held> held_;                     // by stage before the loop, in their order
    Arrays inputs_;                              // of the last call
    std::size_t first_ = 0, last_ = 0;           // its samples
    Groups groups_ = Groups::BOTH;
};

}  // namespace dit_runtime
