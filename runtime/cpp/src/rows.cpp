#include "rows.hpp"

#include <algorithm>
#include <chrono>

#include "errors.hpp"
#include "facts.hpp"
#include "warming.hpp"

namespace dit_runtime {

const double TOLERANCE = constant("batch_tolerance");

namespace {

constexpr int REPEATS = 5;       // of a batch size: the least of so many calls,
constexpr double SECONDS = 1.0;  // or of those that fit

}  // namespace

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Curve measure(Pipeline& pipe, const Clock& clock) {
    const Manifest& manifest = pipe.manifest;
    const Array times = {static_cast<double>(manifest.process.train_steps) / 2};
    Curve curve;
    for (const std::size_t size : sizes(static_cast<std::size_t>(manifest.step().max_batch))) {
        Rows condition = made_up(manifest, size);
        const std::vector<float> weights(size, static_cast<float>(manifest.guidance.weight));
        if (!manifest.guidance.port.empty()) condition.arrays[manifest.guidance.port] = {with_rows(size, {}), weights};
        Memo memo = pipe.memo(times, condition, manifest.mixes_guidance() ? slice(condition, 0, 1) : Rows());
        const std::vector<float> state(size * count(manifest.state().shape));
        const auto evaluate = [&] {
            pipe.denoise(
                state, [&](std::size_t first, std::size_t last) -> const Arrays& { return memo(0, first, last); },
                weights);
        };
        evaluate();  // what is compiled or filled once
        double least = 0, sum = 0;
        for (int repeat = 0; repeat < REPEATS && sum < SECONDS; ++repeat) {
            const double began = clock();
            evaluate();
            const double spent = clock() - began;
            least = repeat ? std::min(least, spent) : spent;
            sum += spent;
        }
        curve[size] = least;
        if (curve.size() > 2 && knee(curve) <= size / 4) break;
    }
    return curve;
}

std::vector<std::size_t> sizes(std::size_t largest) {
    std::vector<std::size_t> sizes;
    for (std::size_t size = 1; size < largest; size *= 2) sizes.push_back(size);
    sizes.push_back(largest);
    return sizes;
}

std::size_t knee(const Curve& curve) {
    const auto each = [](const auto& point) { return point.second / static_cast<double>(point.first); };
    double least = each(*curve.begin());
    for (const auto& point : curve) least = std::min(least, each(point));
    for (const auto& point : curve)
        if (each(point) <= (1 + TOLERANCE) * least) return point.first;
    return 1;
}

Sized::Sized(Pipeline& pipe, Curve measured, std::size_t most)
    : pipe(pipe),
      curve(std::move(measured)),
      places(most                     ? most
             : pipe.batch_invariant() ? knee(curve)
                                      : 1) {
    const auto nearest = std::prev(curve.upper_bound(places));
    row = nearest->second / static_cast<double>(nearest->first) / (pipe.manifest.mixes_guidance() ? 2 : 1);
}

}  // namespace dit_runtime
