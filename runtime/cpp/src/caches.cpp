#include "caches.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "errors.hpp"
#include "facts.hpp"

namespace dit_runtime {
namespace {

constexpr double TINY = 1e-12;  // a mean below this counts as this

// The steps between which a cache may take the place of the network.
struct Window {
    Window(const Settings& settings, std::int64_t steps)
        : before(static_cast<std::int64_t>(settings.at("disable_cache_before_step"))),
          after(static_cast<std::int64_t>(settings.at("disable_cache_after_step"))) {
        if (after < 0) after += steps;
    }
    bool has(std::int64_t step) const { return before <= step && step < after; }

    std::int64_t before, after;
};

// TaylorSeer, Liu et al. 2025 (arXiv 2503.06923), on the network's output; its steps are diffusers'.
//
// Σ_k D_k n^k / k! over orders up to `max_order`, n steps after the last computed one, where D_0 is its prediction
// and D_k are divided differences over the computed steps. Every `cache_interval`-th step is computed.
class TaylorSeer : public Cache {
  public:
    TaylorSeer(const Settings& settings, std::int64_t steps)
        : window_(settings, steps),
          interval_(static_cast<std::int64_t>(settings.at("cache_interval"))),
          order_(static_cast<std::size_t>(settings.at("max_order"))) {}

    void clear() override { factors_.clear(); }

    std::optional<std::vector<float>> guess(std::int64_t step, const Array&) override {
        if (computes(step) || factors_.empty()) return std::nullopt;
        const auto ahead = static_cast<double>(step - last_);
        std::vector<float> prediction(factors_[0].size());
        for (std::size_t i = 0; i < prediction.size(); ++i) {
            double total = factors_[0][i], power = 1, factorial = 1;
            for (std::size_t order = 1; order < factors_.size(); ++order) {
                power *= ahead, factorial *= static_cast<double>(order);
                total += factors_[order][i] * (power / factorial);
            }
            prediction[i] = static_cast<float>(total);
        }
        return prediction;
    }

    void add(std::int64_t step, const Array&, const std::vector<float>& prediction) override {
        std::vector<Array> factors = {{prediction.begin(), prediction.end()}};
        const auto width = static_cast<double>(step - last_);
        for (std::size_t order = 0; order < std::min(order_, factors_.size()); ++order) {
            Array next(prediction.size());
            for (std::size_t i = 0; i < next.size(); ++i) next[i] = (factors[order][i] - factors_[order][i]) / width;
            factors.push_back(std::move(next));
        }
        factors_ = std::move(factors);
        last_ = step;
    }

    std::optional<std::size_t> count_rows(const std::vector<std::optional<Groups>>& groups) const override {
        std::size_t total = 0;
        for (std::size_t step = 0; step < groups.size(); ++step) {
            const bool begins = step == 0 || groups[step] != groups[step - 1];
            if (groups[step] && (begins || computes(static_cast<std::int64_t>(step)))) total += rows(*groups[step]);
        }
        return total;
    }

  private:
    // True if the schedule evaluates the network at a step.
    bool computes(std::int64_t step) const {
        return !window_.has(step) || (step - window_.before - 1 + interval_) % interval_ == 0;
    }

    const Window window_;
    const std::int64_t interval_;
    const std::size_t order_;
    std::vector<Array> factors_;
    std::int64_t last_ = 0;
};

double mean(const Array& values) {
    double total = 0;
    for (const double value : values) total += std::abs(value);
    return total / static_cast<double>(values.size());
}

double apart(const Array& values, const Array& others) {
    Array difference(values.size());
    std::transform(values.begin(), values.end(), others.begin(), difference.begin(), std::minus<>());
    return mean(difference);
}

// EasyCache, Zhou et al. 2025 (arXiv 2507.02860): x + (v_i - x_i) of the last computed step i, while E < τ.
//
// E sums k |x - x_before| / |v_i| over the steps since i, where k is |v_i - v_j| / |x_i - x_j| of the last two
// computed steps, |·| is the mean over all samples of a run, and τ is `cache_threshold`.
class EasyCache : public Cache {
  public:
    EasyCache(const Settings& settings, std::int64_t steps)
        : window_(settings, steps), threshold_(settings.at("cache_threshold")) {}

    void clear() override {
        before_.clear();
        input_.clear();
        rate_.reset();
        error_ = 0;
    }

    std::optional<std::vector<float>> guess(std::int64_t step, const Array& x) override {
        const Array before = std::exchange(before_, x);
        if (!window_.has(step) || before.empty() || input_.empty() || !rate_) {
            error_ = 0;
            return std::nullopt;
        }
        error_ += *rate_ * apart(x, before) / std::max(mean(output_), TINY);
        if (error_ < threshold_) {
            std::vector<float> prediction(x.size());
            for (std::size_t i = 0; i < x.size(); ++i)
                prediction[i] = static_cast<float>(x[i] + (output_[i] - input_[i]));
            return prediction;
        }
        error_ = 0;
        return std::nullopt;
    }

    void add(std::int64_t, const Array& x, const std::vector<float>& prediction) override {
        Array output(prediction.begin(), prediction.end());
        if (!input_.empty())
            if (const double moved = apart(x, input_); moved != 0) rate_ = apart(output, output_) / moved;
        input_ = x;
        output_ = std::move(output);
    }

    std::optional<std::size_t> count_rows(const std::vector<std::optional<Groups>>&) const override {
        return std::nullopt;
    }

  private:
    const Window window_;
    const double threshold_;
    Array before_;          // x of the step before
    Array input_, output_;  // x and v of the last computed step
    std::optional<double> rate_;
    double error_ = 0;
};

void require_setting(const std::string& key, double value) {
    static const std::map<std::string, std::pair<double, double>> bounds = {
        {"cache_interval", {1, INFINITY}},
        {"max_order", {0, 2}},
        {"disable_cache_before_step", {0, INFINITY}},
        {"disable_cache_after_step", {-INFINITY, INFINITY}},
        {"cache_threshold", {0, INFINITY}}};
    const auto [low, high] = bounds.at(key);
    const bool whole = key != "cache_threshold";
    if (std::isfinite(value) && value >= low && value <= high) return;
    const std::string least = std::isinf(low) ? "" : text(" of ", low, " or more");
    throw UsageError(text(key, " is ", value, "; expected ", whole ? "an integer" : "a number",
                          std::isinf(high) ? least : text(" from ", low, " to ", high)));
}

}  // namespace

std::unique_ptr<Cache> make_cache(const std::string& name, const Settings& settings, std::int64_t steps,
                                  std::int64_t evaluations) {
    const std::vector<std::string> known = fact_names("caches");
    std::vector<std::string> keys;
    for (const auto& [key, value] : settings) keys.push_back(key);
    if (name.empty()) {
        if (!settings.empty()) throw UsageError(text("got ", join(keys), " without a cache; known: ", join(known)));
        return nullptr;
    }
    if (!contains(known, name))
        throw UsageError(text("cache '", name, "' is not known", nearest(name, known), "; known: ", join(known)));
    Settings chosen;
    std::vector<std::string> taken;
    for (const auto& entry : facts().at("caches").at(name).items()) {
        chosen[entry.key()] = entry.value().get<double>();
        taken.push_back(entry.key());
    }
    for (const std::string& key : keys)
        if (!chosen.count(key)) throw UsageError(text("cache ", name, " has no ", key, "; it takes ", join(taken)));
    if (evaluations != 1)
        throw UsageError(
            text("cache is '", name, "' with a solver of ", evaluations, " evaluations a step; take one of 1"));
    for (const auto& [key, value] : settings) chosen[key] = value;
    for (const auto& [key, value] : chosen) require_setting(key, value);
    if (name == "taylorseer") return std::make_unique<TaylorSeer>(chosen, steps);
    return std::make_unique<EasyCache>(chosen, steps);
}

}  // namespace dit_runtime
