// One trajectory, a step at a time. Mirrors dit_runtime/run.py.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "loops.hpp"
#include "memo.hpp"
#include "request.hpp"

namespace dit_runtime {

class Pipeline;

// What the step stage reads for the next step of a run: B samples in G groups of conditions. Asks of one G may share a
// call: their states, weights and answers are stacked on axis 0, what has groups on axis 1.
struct Ask {
    std::size_t step;  // number of the evaluation, from 0
    Groups groups;
    std::vector<float> state;    // (B, *state)
    std::vector<float> weights;  // (B,)
    Memo* memo;                  // the other inputs; it belongs to the run

    std::size_t places() const { return weights.size(); }                              // B
    std::size_t number() const { return groups == Groups::APART ? 1 : rows(groups); }  // G
};

// A run of a request that its pipeline can answer; the pipeline outlives it.
class Run {
  public:
    // Checks the request and encodes its picture. `compute` runs the stages before the loop, in the place of the
    // pipeline: a service shares what they give.
    Run(Pipeline& pipe, const Request& request, RunRows compute = {}, std::size_t budget = MEMO_BYTES);

    // Goes one step; true while there is more to do. After an engine's failure it can be called again. On a device a
    // step is queued; who looks at the state waits for it.
    bool step();
    // What the next step needs of the network; none where it needs nothing, or none is left. A batcher calls this and
    // `tell` in the place of `step`.
    std::optional<Ask> ask();
    // Goes the next step with the network's answer, or without where `ask` gave none; true while there is more to do.
    bool tell(Prediction answer);
    bool tell();

    // The latents after the steps so far, [N, *state]; with one that is the first, the noise.
    const Array& state();
    // The latents after all steps, with those that are still to do.
    std::vector<float> latents();
    // The decoded latents after all steps, uint8 [N, H, W, 3].
    std::vector<std::uint8_t> pictures();
    // The decoded end of the path as the last step's prediction has it, uint8 [N, H, W, 3].
    std::vector<std::uint8_t> preview();
    // Any thread may call it: the step or decoding that is under way, or else the next one, throws Stopped.
    void cancel() { cancellation_->cancel(); }

    Pipeline& pipe() const { return pipe_; }  // at the run's size
    const Timing& timing() const { return timing_; }
    int done() const { return static_cast<int>(loop_ ? loop_->done() : trajectory_.done()); }
    std::size_t count() const { return checked_.condition.rows; }
    int steps() const { return static_cast<int>(checked_.timesteps.size()); }
    // The rows that the network evaluated for each sample: evaluations × groups.
    std::size_t rows() const;
    // What that is when the run has ended; none where its cache decides that step by step.
    std::optional<std::size_t> planned_rows() const { return trajectory_.planned_rows(); }

  private:
    Trajectory begin(const Request& request);
    std::unique_ptr<MatrixLoop> begin_on_device();
    Memo& memo(const std::optional<Device>& device);
    void require_going() const;
    // Makes the call as one of the run's, which its cancelling stops.
    template <typename Make>
    decltype(auto) as_own(const Make& make);

    Pipeline& pipe_;
    Checked checked_;
    const OnStep on_step_;
    const RunRows compute_;
    const std::size_t budget_;  // of its memo, in bytes
    Timing timing_;
    const std::shared_ptr<Cancellation> cancellation_ = std::make_shared<Cancellation>();
    const Cancellation::Hook with_others_;  // it may cancel at once
    const double eta_;
    const std::string spacing_;
    bool on_host_ = true;  // what the request asks for needs each prediction there
    Trajectory trajectory_;
    std::unique_ptr<Memo> memo_;
    DeviceRows weights_, chosen_;       // of guidance, on a device: all, and those of the last samples
    std::unique_ptr<MatrixLoop> loop_;  // on a device, in the place of the trajectory
};

}  // namespace dit_runtime
