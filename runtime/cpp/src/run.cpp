#include "run.hpp"

#include "errors.hpp"
#include "pipeline.hpp"
#include "start.hpp"

namespace dit_runtime {

namespace {

// Twice the values: what is apart has a sample for each condition.
template <typename Values>
Values twice(const Values& values) {
    Values both = values;
    both.insert(both.end(), values.begin(), values.end());
    return both;
}

}  // namespace

Run::Run(Pipeline& pipe, const Request& request, RunRows compute, std::size_t budget)
    : pipe_(pipe.at(request.size)),
      checked_(check(pipe_.manifest, request)),
      on_step_(request.on_step),
      compute_(std::move(compute)),
      budget_(budget),
      with_others_(request.cancellation ? request.cancellation : current_call().cancellation,
                   [own = cancellation_] { own->cancel(); }),
      trajectory_(begin(request)) {}

// The trajectory from the request's picture, its latents, or noise.
Trajectory Run::begin(const Request& request) {
    const Manifest& manifest = pipe_.manifest;
    const std::size_t samples = checked_.condition.rows;
    const Draw draw = dit_runtime::draw(request.seeds, samples);
    const Shape& shape = manifest.state().shape;
    const std::size_t row = dit_runtime::count(shape), size = samples * row;
    Array x;
    Keep keep;
    if (!checked_.image.empty()) {
        const CallScope scope({cancellation_, {}, &timing_});
        const Encoded encoded = pipe_.encode_pictures(std::exchange(checked_.image, {}));
        if (const Port* const picture = manifest.picture()) {
            const std::vector<float>& mean = encoded.at(MEAN);
            Tensor& latents = checked_.condition.arrays[picture->name] = {with_rows(samples, shape)};
            while (latents.floats.size() < size) latents.floats.insert(latents.floats.end(), mean.begin(), mean.end());
        } else {
            const auto start = std::make_shared<const Start>(encoded, samples, shape, draw, checked_.levels);
            x = start->at(0);
            if (!checked_.mask.empty())
                keep = [start, mask = checked_.mask](std::size_t evaluations, Array& state) {
                    start->keep(evaluations, state, mask);
                };
        }
    }
    if (x.empty()) {
        const std::vector<float> numbers = request.latents ? *request.latents : draw(size);
        x.assign(numbers.begin(), numbers.end());
    }
    Solver solver(manifest.process, checked_.solver, checked_.steps, std::move(x), draw, request.eta, request.spacing,
                  checked_.first);
    Mix mix;
    if (std::shared_ptr<Policy> policy = make_policy(request.guidance_policy))
        mix = [policy, weights = checked_.weights,
               guided = row / static_cast<std::size_t>(shape[0]) *
                        static_cast<std::size_t>(manifest.guidance.channels)](const std::vector<float>& prediction) {
            return policy->mix(prediction, weights, guided);
        };
    auto cache = make_cache(request.cache, request.cache_settings, static_cast<std::int64_t>(checked_.timesteps.size()),
                            evaluations(checked_.solver));
    return {std::move(solver), checked_.timesteps, checked_.groups, std::move(mix), std::move(cache), std::move(keep)};
}

template <typename Make>
auto Run::as_own(const Make& make) {
    const CallScope scope({cancellation_, {}, &timing_});
    try {
        return make();
    } catch (const Stopped&) {
        require_going();
        throw;
    }
}

bool Run::step() {
    require_going();
    if (done() == steps()) return false;
    if (const auto ask = this->ask()) {
        const auto inputs = [&](std::size_t first, std::size_t last) -> const Arrays& {
            return (*ask->memo)(ask->step, first, last, ask->groups);
        };
        tell(as_own([&] { return pipe_.denoise(ask->state, inputs, ask->weights); }));
    } else {
        tell();
    }
    if (on_step_ && on_step_(done(), steps(), state())) cancel();
    require_going();
    return done() < steps();
}

std::optional<Ask> Run::ask() {
    require_going();
    const auto groups = trajectory_.asks();
    if (!groups) return std::nullopt;
    if (!memo_)
        memo_ = as_own([&] {
            return std::make_unique<Memo>(
                pipe_.memo(checked_.timesteps, checked_.condition, checked_.negative, compute_, budget_));
        });
    const std::vector<float> state(this->state().begin(), this->state().end());
    const bool apart = *groups == Groups::APART;
    return Ask{trajectory_.done(), *groups, apart ? twice(state) : state,
               apart ? twice(checked_.weights) : checked_.weights, memo_.get()};
}

bool Run::tell(Prediction answer) {
    require_going();
    trajectory_.tell(std::move(answer));
    return done() < steps();
}

bool Run::tell() {
    require_going();
    if (done() < steps()) trajectory_.tell();
    return done() < steps();
}

std::vector<float> Run::latents() {
    while (step()) continue;
    return {state().begin(), state().end()};
}

std::vector<std::uint8_t> Run::pictures() {
    pipe_.require_decoder();
    const std::vector<float> latents = this->latents();
    return as_own([&] { return pipe_.pictures(latents); });
}

std::vector<std::uint8_t> Run::preview() {
    pipe_.require_decoder();
    require_going();
    const Array& x0 = trajectory_.x0();
    if (x0.empty()) throw UsageError("there is no preview before the first step; call dit_run_step first");
    return as_own([&] { return pipe_.pictures({x0.begin(), x0.end()}); });
}

void Run::require_going() const {
    if (cancellation_->cancelled()) throw Stopped(text("stopped after step ", done(), " of ", steps()));
}

}  // namespace dit_runtime
