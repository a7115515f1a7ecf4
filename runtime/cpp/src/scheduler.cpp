#include "scheduler.hpp"

#include "facts.hpp"

namespace dit_runtime {

const double STRETCH = constant("due_stretch"), MARGIN = constant("deadline_margin");
const double PASSED = constant("deadline_passed");
const double FAST = constant("fast_mean"), SLOW = constant("slow_mean");

void Costs::update(const std::string& what, double seconds, double units) {
    std::vector<Mean>& means = means_[what];
    if (means.empty()) means = {{FAST, seconds, units}, {SLOW, seconds, units}};
    for (Mean& mean : means) {
        mean.seconds += mean.weight * (seconds - mean.seconds);
        mean.units += mean.weight * (units - mean.units);
    }
}

double Costs::operator()(const std::string& what) const {
    const auto known = means_.find(what);
    double slowest = 0.0;
    if (known != means_.end())
        for (const Mean& mean : known->second) slowest = std::max(slowest, mean.seconds / mean.units);
    return slowest;
}

}  // namespace dit_runtime
