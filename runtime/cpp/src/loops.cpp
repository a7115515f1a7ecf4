#include "loops.hpp"

#include <algorithm>

#include "errors.hpp"

namespace dit_runtime {

Trajectory::Trajectory(Solver solver, Array times, std::vector<std::optional<Groups>> groups, Mix mix,
                       std::unique_ptr<Cache> cache, Keep keep)
    : solver_(std::move(solver)),
      times_(std::move(times)),
      groups_(std::move(groups)),
      mix_(std::move(mix)),
      cache_(std::move(cache)),
      keep_(std::move(keep)) {
    take_guess();
}

std::optional<std::size_t> Trajectory::planned_rows() const {
    if (cache_) return cache_->count_rows(groups_);
    std::size_t total = 0;
    for (const auto& groups : groups_)
        if (groups) total += dit_runtime::rows(*groups);
    return total;
}

std::optional<Groups> Trajectory::asks() const {
    if (done_ == groups_.size() || guess_) return std::nullopt;
    return groups_[done_];
}

void Trajectory::tell(Prediction answer) {
    const Groups groups = asks().value();
    require_finite(answer.prediction);
    if (groups == Groups::APART && mix_) {
        answer.prediction = mix_(answer.prediction);
        answer.variance.resize(answer.variance.size() / 2);
        require_finite(answer.prediction);
    }
    if (cache_) cache_->add(static_cast<std::int64_t>(done_), state(), answer.prediction);
    variance_ = answer.variance;
    rows_ += dit_runtime::rows(groups);
    advance(answer);
}

void Trajectory::tell() { advance({guess_.value(), variance_}); }

void Trajectory::advance(const Prediction& prediction) {
    if (keep_) x0_ = solver_.end(state(), prediction);
    solver_.send(prediction);
    ++done_;
    if (keep_) {
        restored_ = solver_.x();
        keep_(done_, restored_);
    }
    take_guess();
}

void Trajectory::take_guess() {
    guess_.reset();
    if (done_ == groups_.size()) return;
    const auto& groups = groups_[done_];
    if (!groups) {
        guess_.emplace(state().size());
    } else if (cache_) {
        if (done_ && groups_[done_ - 1] != groups) cache_->clear();
        guess_ = cache_->guess(static_cast<std::int64_t>(done_), state());
    }
}

void Trajectory::require_finite(const std::vector<float>& prediction) const {
    if (!all_finite(prediction))
        throw NotFinite(
            text("step ", done_ + 1, " (t = ", times_[done_], "): the prediction holds values that are not finite"));
}

MatrixLoop::MatrixLoop(const std::vector<Matrix>& matrices, Device device, Stage step, Stage update,
                       const std::string& state, const Array& x, const Shape& shape, Inputs inputs)
    : device_(std::move(device)),
      step_(std::move(step)),
      update_(std::move(update)),
      name_(state),
      inputs_(std::move(inputs)) {
    const std::size_t row = count(shape), samples = x.size() / row, size = static_cast<std::size_t>(step_.max_batch);
    for (std::size_t first = 0; first < samples; first += size) {
        const std::size_t last = std::min(first + size, samples);
        const auto begin = x.begin() + static_cast<std::ptrdiff_t>(first * row);
        const auto end = x.begin() + static_cast<std::ptrdiff_t>(last * row);
        const std::vector<float> values(begin, end), zeros(values.size());
        const Shape rows = with_rows(last - first, shape);
        const auto put = [&](const std::vector<float>& numbers) { return device_.put({name_, rows, numbers.data()}); };
        parts_.push_back({first, last, put(values), put(zeros), put(zeros)});
    }
    std::vector<float> numbers;
    for (const Matrix& matrix : matrices)
        for (const auto& coefficients : matrix) numbers.insert(numbers.end(), coefficients.begin(), coefficients.end());
    coefficients_ = device_.put({"coefficients", with_rows(matrices.size(), {2, 3}), numbers.data()});
}

void MatrixLoop::advance() {
    home_.clear();
    const DeviceRows coefficients = coefficients_.take({done_}, {});
    for (Part& part : parts_) {
        if (part.updated > done_) continue;
        const auto input = [](const std::string& name, const DeviceRows& rows) {
            Input input{name, rows.shape(), nullptr};
            input.device = &rows;
            return input;
        };
        std::vector<Input> inputs = inputs_(done_, part.first, part.last);
        inputs.push_back(input(name_, part.state));
        device_.run(step_, inputs, {{"prediction", part.prediction}});
        device_.run(update_,
                    {input(name_, part.state), input("prediction", part.prediction), input("previous", part.previous),
                     input("coefficients", coefficients)},
                    {{"kept", part.previous}, {"next", part.state}});
        ++part.updated;
    }
    ++done_;
}

const Array& MatrixLoop::state() {
    if (home_.empty()) home_ = home(&Part::state);
    return home_;
}

Array MatrixLoop::x0() const { return done_ ? home(&Part::previous) : Array(); }

Array MatrixLoop::home(DeviceRows Part::* rows) const {
    Array values;
    for (const Part& part : parts_) {
        const std::vector<float> numbers = device_.home(part.*rows);
        if (!all_finite(numbers))
            throw NotFinite(text("step ", done_, " or one before: the state holds values that are not finite"));
        values.insert(values.end(), numbers.begin(), numbers.end());
    }
    return values;
}

}  // namespace dit_runtime
