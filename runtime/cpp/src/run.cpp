#include "run.hpp"

#include <algorithm>

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
      eta_(request.eta),
      spacing_(request.spacing),
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
    const bool skips =
        std::any_of(checked_.groups.begin(), checked_.groups.end(), [](const auto& own) { return !own; });
    on_host_ = compute_ || mix || cache || keep || skips || evaluations(checked_.solver) > 1;
    return {std::move(solver), checked_.timesteps, checked_.groups, std::move(mix), std::move(cache), std::move(keep)};
}

template <typename Make>
decltype(auto) Run::as_own(const Make& make) {
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
    if (!done() && !loop_) loop_ = as_own([&] { return begin_on_device(); });
    if (loop_) {
        as_own([&] { loop_->advance(); });
    } else if (const auto ask = this->ask()) {
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

// The loop on the device where all that the run needs can be there; else NULL.
std::unique_ptr<MatrixLoop> Run::begin_on_device() {
    const Manifest& manifest = pipe_.manifest;
    if (on_host_ || !pipe_.updates_on_device()) return nullptr;
    const auto matrices = linear(manifest.process, checked_.solver, checked_.steps, eta_, spacing_, checked_.first);
    if (!matrices) return nullptr;
    const Device device = *pipe_.device();
    if (manifest.mixes_guidance()) weights_ = device.put({GUIDANCE, with_rows(count(), {}), checked_.weights.data()});
    const auto inputs = [this, &memo = memo(device)](std::size_t step, std::size_t first, std::size_t last) {
        std::vector<Input> inputs;
        for (const auto& [name, tensor] : memo(step, first, last, *checked_.groups[step]))
            inputs.push_back(tensor.input(name));
        if (weights_.memory) {
            chosen_ = weights_.slice(first, last);
            inputs.push_back({GUIDANCE, chosen_.shape(), nullptr});
            inputs.back().device = &chosen_;
        }
        return inputs;
    };
    return std::make_unique<MatrixLoop>(*matrices, device, manifest.step(), *manifest.update, manifest.state().name,
                                        trajectory_.state(), manifest.state().shape, inputs);
}

// What the step reads, made when the run first needs it.
Memo& Run::memo(const std::optional<Device>& device) {
    if (!memo_)
        memo_ = as_own([&] {
            return std::make_unique<Memo>(
                pipe_.memo(checked_.timesteps, checked_.condition, checked_.negative, compute_, budget_, device));
        });
    return *memo_;
}

std::optional<Ask> Run::ask() {
    require_going();
    const auto groups = trajectory_.asks();
    if (!groups) return std::nullopt;
    Memo& memo = this->memo(compute_ || memo_ ? std::nullopt : pipe_.device());
    const std::vector<float> state(this->state().begin(), this->state().end());
    const bool apart = *groups == Groups::APART;
    return Ask{trajectory_.done(), *groups, apart ? twice(state) : state,
               apart ? twice(checked_.weights) : checked_.weights, &memo};
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

const Array& Run::state() {
    if (!loop_) return trajectory_.state();
    const CallScope scope({{}, {}, &timing_});  // also of a run that was cancelled
    return loop_->state();
}

std::size_t Run::rows() const {
    if (!loop_) return trajectory_.rows();
    std::size_t total = 0;
    for (std::size_t step = 0; step < loop_->done(); ++step) total += dit_runtime::rows(*checked_.groups[step]);
    return total;
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
    const Array x0 = loop_ ? as_own([&] { return loop_->x0(); }) : trajectory_.x0();
    if (x0.empty()) throw UsageError("there is no preview before the first step; call dit_run_step first");
    return as_own([&] { return pipe_.pictures({x0.begin(), x0.end()}); });
}

void Run::require_going() const {
    if (cancellation_->cancelled()) throw Stopped(text("stopped after step ", done(), " of ", steps()));
}

}  // namespace dit_runtime
