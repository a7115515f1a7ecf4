#include "loops.hpp"

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
        kept_ = solver_.x();
        keep_(done_, kept_);
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

}  // namespace dit_runtime
