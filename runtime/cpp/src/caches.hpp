// Output caches: predictions of earlier steps that take the place of an evaluation of the network.
// Mirrors dit_runtime/sampling/caches.py.
//
// A cache holds guided predictions, so it starts anew where guidance begins, ends or changes its groups.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "guidance.hpp"

namespace dit_runtime {

using Settings = std::map<std::string, double>;  // fields of a request that are not the defaults

// A run's cache; steps are computed before the step `before`, and from the step `after` on.
class Cache {
  public:
    virtual ~Cache() = default;

    // Forgets all predictions.
    virtual void clear() = 0;
    // The prediction at x; none where the network must be evaluated. Called once a step, in order.
    virtual std::optional<std::vector<float>> guess(std::int64_t step, const Array& x) = 0;
    // Takes the network's prediction at x.
    virtual void add(std::int64_t step, const Array& x, const std::vector<float>& prediction) = 0;
    // The rows that a run evaluates for each sample; none where that is not known beforehand.
    virtual std::optional<std::size_t> count_rows(const std::vector<std::optional<Groups>>& groups) const = 0;
};

// A run's cache; NULL without a name.
std::unique_ptr<Cache> make_cache(const std::string& name, const Settings& settings, std::int64_t steps,
                                  std::int64_t evaluations);

}  // namespace dit_runtime
