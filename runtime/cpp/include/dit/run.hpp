// A run that the caller steps. Included by dit.hpp.
#ifndef DIT_RUN_HPP
#define DIT_RUN_HPP

#include <memory>
#include <utility>
#include <vector>

#include "dit/pipeline.hpp"

namespace dit {

// One run, a step at a time.
class Run {
  public:
    Run(const Pipeline& pipe, const Request& request)
        : count_(pipe.count(request)),
          row_(pipe.row(request)),
          size_(pipe.size_of(request)),
          call_(std::make_unique<Call>(request.on_step)) {
        dit_run* made = nullptr;
        pipe.call(request, call_->step,
                  [&](const dit_request& from) { return dit_run_begin(pipe.get(), &from, &made); });
        run_.reset(made);
    }

    // Goes one step; true while there is more to do.
    bool step() {
        int more = 0;
        finish(dit_run_step(run_.get(), &more));
        return more != 0;
    }

    // The state after the steps so far.
    std::vector<float> latents() {
        std::vector<float> numbers(count_ * row_);
        finish(dit_run_latents(run_.get(), numbers.data(), numbers.size()));
        return numbers;
    }

    Rows rows() {
        Rows rows;
        finish(dit_run_rows(run_.get(), &rows.done, &rows.planned));
        return rows;
    }

    // Does what is left of the run and decodes it.
    Images result() {
        Images images = Pipeline::empty_images(count_, size_);
        std::uint8_t none = 0;
        std::uint8_t* pixels = images.pixels.empty() ? &none : images.pixels.data();
        finish(dit_run_result(run_.get(), pixels, images.pixels.size()));
        return images;
    }

    // The end of the path as the last step's prediction has it, decoded.
    Images preview() {
        Images images = Pipeline::empty_images(count_, size_);
        finish(dit_run_preview(run_.get(), images.pixels.data(), images.pixels.size()));
        return images;
    }

    dit_stats stats() {
        dit_stats stats = DIT_STATS_INIT;
        finish(dit_run_stats(run_.get(), &stats));
        return stats;
    }

    // Any thread may call it.
    void cancel() { dit_run_cancel(run_.get()); }

  private:
    struct Free {
        void operator()(dit_run* run) const { dit_run_free(run); }
    };

    struct Call {
        explicit Call(decltype(Request::on_step) on_step) : function(std::move(on_step)), step{function, nullptr} {}
        const decltype(Request::on_step) function;
        Pipeline::OnStep step;
    };

    void finish(dit_status status) {
        Pipeline::rethrow(call_->step);
        Pipeline::check(status);
    }

    std::size_t count_, row_;
    Size size_;
    std::unique_ptr<Call> call_;  // before the run, which may call it
    std::unique_ptr<dit_run, Free> run_;
};

inline Run Pipeline::run(const Request& request) const { return Run(*this, request); }

}  // namespace dit

#endif  // DIT_RUN_HPP
