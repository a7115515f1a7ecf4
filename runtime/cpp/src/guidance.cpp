#include "guidance.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>

#include "errors.hpp"

namespace dit_runtime {
namespace {

constexpr double TINY = 1e-12;  // a norm below this counts as this
constexpr double INFINITE = std::numeric_limits<double>::infinity();

double dot(const Array& a, const Array& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

double norm(const Array& values) { return std::sqrt(dot(values, values)); }

// But for √N, which is the same in both of a ratio.
double deviation(Array values) {
    const double mean = std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
    for (double& value : values) value -= mean;
    return norm(values);
}

// Rescaled guidance, Lin et al. 2023 (arXiv 2305.08891), equations 14 to 16.
//
// g = c + (w - 1) (c - u),  φ std(c) / std(g) g + (1 - φ) g, with φ as `guidance_rescale`.
class Rescale : public Policy {
    using Policy::Policy;
    Array guide(const Array& c, const Array& u, double w, std::size_t) override {
        const double share = number("guidance_rescale");
        Array guided(c.size());
        for (std::size_t i = 0; i < c.size(); ++i) guided[i] = c[i] + (w - 1) * (c[i] - u[i]);
        const double scale = share * deviation(c) / std::max(deviation(guided), TINY) + (1 - share);
        for (double& value : guided) value *= scale;
        return guided;
    }
};

// CFG-Zero*, Fan et al. 2025 (arXiv 2503.18886), algorithm 1: c + (w - 1) (c - s u),  s = <c, u> / |u|².
//
// The first `zero_init_steps` steps take a velocity of 0 and evaluate nothing.
class ZeroStar : public Policy {
    using Policy::Policy;
    Array guide(const Array& c, const Array& u, double w, std::size_t) override {
        const double scale = dot(c, u) / (dot(u, u) + 1e-8);
        Array guided(c.size());
        for (std::size_t i = 0; i < c.size(); ++i) guided[i] = c[i] + (w - 1) * (c[i] - scale * u[i]);
        return guided;
    }
};

// Adaptive projected guidance, Sadat et al. 2024 (arXiv 2410.02416), algorithm 1, on what the network predicts.
//
// d = c - u + β d_before;  d' = d min(1, r / |d|);  c + (w - 1) (d' - p + η p), where p is the part of d' along c,
// β is `momentum`, r is `norm_threshold` (0: none) and η is `eta`.
class Projected : public Policy {
    using Policy::Policy;
    Array guide(const Array& c, const Array& u, double w, std::size_t sample) override {
        averages_.resize(std::max(averages_.size(), sample + 1));
        Array& average = averages_[sample];
        average.resize(c.size());
        const double momentum = number("momentum"), threshold = number("norm_threshold"), eta = number("eta");
        for (std::size_t i = 0; i < c.size(); ++i) average[i] = c[i] - u[i] + momentum * average[i];
        Array difference = average, direction = c;
        if (threshold > 0) {
            const double scale = std::min(1.0, threshold / std::max(norm(difference), TINY));
            for (double& value : difference) value *= scale;
        }
        const double length = std::max(norm(c), TINY);
        for (double& value : direction) value /= length;
        const double along = dot(difference, direction);
        Array guided(c.size());
        for (std::size_t i = 0; i < c.size(); ++i) {
            const double parallel = along * direction[i];
            guided[i] = c[i] + (w - 1) * (difference[i] - parallel + eta * parallel);
        }
        return guided;
    }

    std::vector<Array> averages_;  // of each sample
};

struct Words {
    std::string name;
    std::map<std::string, double> numbers;
    bool names(const std::string& key) const { return contains(own, key); }
    std::vector<std::string> own;  // the numbers that are not left out
};

// The name and the numbers of "NAME KEY=VALUE …"; those that are left out have their defaults.
Words parse(const std::string& words) {
    const auto& policies = facts().at("guidance_policies");
    std::istringstream stream(words.empty() ? "constant" : words);
    Words parsed;
    stream >> parsed.name;
    const std::vector<std::string> known = fact_names("guidance_policies");
    if (!contains(known, parsed.name))
        throw UsageError(text("guidance_policy '", parsed.name, "' is not known", nearest(parsed.name, known),
                              "; known: ", join(known)));
    std::vector<std::string> keys;
    for (const auto& entry : policies.at(parsed.name).items()) {
        keys.push_back(entry.key());
        parsed.numbers[entry.key()] = entry.value().get<double>();
    }
    static const std::map<std::string, std::pair<double, double>> bounds = {
        {"guidance_rescale", {0, 1}}, {"zero_init_steps", {0, 1e6}}, {"norm_threshold", {0, INFINITE}}};
    for (std::string pair; stream >> pair;) {
        const std::string key = pair.substr(0, pair.find('=')),
                          value = pair.substr(std::min(key.size() + 1, pair.size()));
        if (!contains(keys, key))
            throw UsageError(text("guidance_policy ", parsed.name, " has no '", key, "'; it takes ",
                                  keys.empty() ? "no numbers" : join(keys)));
        const double number = dit_runtime::number(value).value_or(std::nan(""));
        const auto bound = bounds.find(key);
        const auto [low, high] = bound == bounds.end() ? std::make_pair(-INFINITE, INFINITE) : bound->second;
        const bool whole = key == "zero_init_steps";
        if (!std::isfinite(number) || number < low || number > high || (whole && number != std::floor(number)))
            throw UsageError(text("guidance_policy: ", key, " is '", value, "'; expected ",
                                  whole ? "an integer" : "a number", " from ", low, " to ", high));
        parsed.numbers[key] = number;
        parsed.own.push_back(key);
    }
    return parsed;
}

bool mixes(const std::string& name) { return name != "constant"; }

}  // namespace

std::size_t rows(Groups groups) { return groups == Groups::BOTH || groups == Groups::APART ? 2 : 1; }

std::vector<float> Policy::mix(const std::vector<float>& prediction, const std::vector<float>& weights,
                               std::size_t guided) {
    const std::size_t count = weights.size(), row = prediction.size() / (2 * count);
    std::vector<float> mixed(prediction.begin(), prediction.begin() + static_cast<std::ptrdiff_t>(count * row));
    for (std::size_t sample = 0; sample < count; ++sample) {
        const float* const own = prediction.data() + sample * row;
        const float* const away = own + count * row;
        const Array values = guide({own, own + guided}, {away, away + guided}, weights[sample], sample);
        if (weights[sample] == 1) continue;
        for (std::size_t i = 0; i < guided; ++i) mixed[sample * row + i] = static_cast<float>(values[i]);
    }
    return mixed;
}

std::unique_ptr<Policy> make_policy(const std::string& words) {
    Words parsed = parse(words);
    if (parsed.name == "rescale") return std::make_unique<Rescale>(std::move(parsed.numbers));
    if (parsed.name == "zero_star") return std::make_unique<ZeroStar>(std::move(parsed.numbers));
    if (parsed.name == "apg") return std::make_unique<Projected>(std::move(parsed.numbers));
    return nullptr;
}

std::vector<std::optional<Groups>> plan_guidance(const Process& process, const Array& times, std::int64_t evaluations,
                                                 bool guided, const Interval& interval, const std::string& words) {
    const auto [low, high] = interval.value_or(std::make_pair(0.0, 1.0));
    if (!(0 <= low && low <= high && high <= 1))
        throw UsageError(
            text("guidance_interval is (", low, ", ", high, "); expected two fractions of the time, low <= high"));
    const Words parsed = parse(words);
    std::size_t zeros = 0;
    if (const auto entry = parsed.numbers.find("zero_init_steps"); entry != parsed.numbers.end())
        zeros = static_cast<std::size_t>(entry->second) * static_cast<std::size_t>(evaluations);
    if (zeros && process.kind() != "flow") {
        if (parsed.names("zero_init_steps"))
            throw UsageError("zero_init_steps needs a model that predicts a velocity; take 0");
        zeros = 0;
    }
    std::vector<std::optional<Groups>> groups;
    for (const double time : times) {
        const double fraction = time / process.span();
        const bool inside = guided && low <= fraction && fraction <= high;
        const Groups own = inside ? (mixes(parsed.name) ? Groups::APART : Groups::BOTH) : Groups::OWN;
        groups.push_back(groups.size() < zeros ? std::nullopt : std::optional<Groups>(own));
    }
    return groups;
}

}  // namespace dit_runtime
