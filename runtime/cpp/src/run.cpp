#include "run.hpp"

#include "errors.hpp"
#include "pipeline.hpp"

namespace dit_runtime {

namespace {

Solver start(const Manifest& manifest, const Request& request, const Checked& checked) {
    const std::size_t count = checked.condition.rows;
    const Draw draw = dit_runtime::draw(request.seeds, count);
    const std::vector<float> x =
        request.latents ? *request.latents : draw(count * dit_runtime::count(manifest.state().shape));
    return {manifest.process, checked.solver, checked.steps, {x.begin(), x.end()}, draw, request.eta, request.spacing};
}

}  // namespace

Run::Run(Pipeline& pipe, const Request& request)
    : pipe_(pipe.at(request.size)),
      checked_(check(pipe_.manifest, request)),
      on_step_(request.on_step),
      solver_(start(pipe_.manifest, request, checked_)) {}

bool Run::step() {
    require_going();
    if (!solver_.asks()) return false;
    if (!memo_) memo_ = std::make_unique<Memo>(pipe_.memo(checked_.timesteps, checked_.condition, checked_.negative));
    const double t = solver_.t();
    const auto index = static_cast<std::size_t>(done_);
    const auto inputs = [&](std::size_t first, std::size_t last) -> const Arrays& {
        return (*memo_)(index, first, last);
    };
    const Prediction answer = pipe_.denoise({state().begin(), state().end()}, inputs, checked_.weights);
    if (!all_finite(answer.prediction))
        throw NotFinite(text("step ", done_ + 1, " (t = ", t, "): the ", pipe_.manifest.step().name,
                             "'s prediction holds values not finite"));
    solver_.send(answer);
    ++done_;
    if (on_step_ && on_step_(done_, steps(), state())) cancel();
    require_going();
    return solver_.asks();
}

std::vector<float> Run::latents() {
    while (step()) continue;
    return {state().begin(), state().end()};
}

void Run::require_going() const {
    if (cancelled_) throw Stopped(text("stopped after step ", done_, " of ", steps()));
}

}  // namespace dit_runtime
