// Guidance: which predictions a step takes of the network, and the policies that mix them in their own way.
// Mirrors dit_runtime/sampling/guidance.py.
//
// A policy reads c, the prediction of a sample's own condition, u, that of its negative, and the weight w. Each sample
// is mixed by itself, in double. Linear guidance, c + (w - 1) (c - u), is the network's own and needs no policy.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "process.hpp"

namespace dit_runtime {

// The rows of the network that a step evaluates for each sample.
enum class Groups {
    OWN,    // its condition alone
    BOTH,   // its condition and its negative, which the network mixes
    APART,  // both, as two unguided samples that a policy mixes
    NULLS   // its negative alone: verification
};

// The rows for each sample.
std::size_t rows(Groups groups);

// A mix of two predictions on the host.
class Policy {
  public:
    explicit Policy(std::map<std::string, double> numbers) : numbers_(std::move(numbers)) {}
    virtual ~Policy() = default;

    // [2 B, C, …], own conditions before negatives -> [B, C, …], guided over the first `guided` numbers of each sample.
    // A sample of weight 1 keeps its own prediction to the bit, whatever the policy.
    std::vector<float> mix(const std::vector<float>& prediction, const std::vector<float>& weights, std::size_t guided);

  protected:
    // The guided prediction of a sample.
    virtual Array guide(const Array& c, const Array& u, double w, std::size_t sample) = 0;
    double number(const std::string& name) const { return numbers_.at(name); }

  private:
    const std::map<std::string, double> numbers_;
};

// The policy of a run by its words, "NAME KEY=VALUE …"; empty words are "constant". NULL where the network mixes its
// predictions itself.
std::unique_ptr<Policy> make_policy(const std::string& words);

using Interval = std::optional<std::pair<double, double>>;

// The groups of each evaluation of a run; none where the prediction is 0 and nothing is evaluated.
//
// A step is guided where low <= t / span <= high: of a noise process t over its training steps, of a flow σ, each as
// the network reads it.
std::vector<std::optional<Groups>> plan_guidance(const Process& process, const Array& times, std::int64_t evaluations,
                                                 bool guided, const Interval& interval, const std::string& words);

}  // namespace dit_runtime
