#include "warming.hpp"

#include <algorithm>
#include <numeric>

#include "errors.hpp"
#include "facts.hpp"
#include "noise.hpp"
#include "pipeline.hpp"
#include "prompts.hpp"
#include "run.hpp"

namespace dit_runtime {
namespace {

const int EVALUATIONS = 2;  // as in Python

// The largest number of steps up to the default that the bundle's schedule has.
std::int64_t steps_of(const Process& process) {
    for (std::int64_t steps = std::min(process.sampler.steps, process.train_steps); steps > 1; --steps) {
        try {
            plan(process, process.sampler.solver, steps);
            return steps;
        } catch (const UsageError&) {
            continue;
        }
    }
    return 1;
}

// Runs stages for their shapes: made-up numbers may lead to any values, which are for no one.
template <typename Call>
void evaluate(const Call& call) {
    try {
        call();
    } catch (const NotFinite&) {
    }
}

}  // namespace

void require_warmable(const Manifest& manifest, const std::vector<std::int64_t>& batches, bool low_memory) {
    const std::int64_t largest = manifest.step().max_batch;
    for (const std::int64_t batch : batches)
        if (batch < 1 || batch > largest)
            throw UsageError(
                text("warm has ", batch, "; expected batch sizes from 1 to ", largest, ", where requests are split"));
    if (!batches.empty() && low_memory)
        throw UsageError("got both warm and low_memory, which keeps no engine open: pass one of them");
}

void warm(Pipeline& pipe, const std::vector<std::int64_t>& batches) {
    const Manifest& manifest = pipe.manifest;
    for (const std::int64_t batch : batches) {
        const auto count = static_cast<std::size_t>(batch);
        const Rows condition = made_up(manifest, count);
        std::vector<std::vector<float>> weights = {{}};
        if (manifest.mixes_guidance()) weights = {{static_cast<float>(default_guidance())}, {1.0f}};
        for (const std::vector<float>& guidance : weights) {
            Request request;
            request.condition = condition.arrays;
            if (guidance != std::vector<float>{1.0f} && !manifest.without_null().empty())
                request.negative = slice(condition, 0, 1).arrays;
            request.count = count;
            request.steps = steps_of(manifest.process);
            request.guidance = guidance;
            request.seeds.resize(count);
            std::iota(request.seeds.begin(), request.seeds.end(), std::uint64_t{0});
            Run run(pipe, request);
            for (int evaluation = 0; evaluation < EVALUATIONS; ++evaluation) evaluate([&] { run.step(); });
            if (manifest.end()) evaluate([&] { pipe.decode({run.state().begin(), run.state().end()}); });
        }
    }
}

Rows made_up(const Manifest& manifest, std::size_t count) {
    Rows rows{count};
    std::uint64_t number = 0;
    Arrays ids;
    std::vector<std::string> masks;
    for (const Prompt& prompt : manifest.prompts) ids[prompt.ids], masks.push_back(prompt.mask);
    for (const Port& port : filled_ports(manifest, ids)) {
        Tensor tensor{with_rows(count, port.shape)};
        const std::size_t size = dit_runtime::count(tensor.shape);
        const bool is_integer = port.dtype == "int64";
        if (!port.masks.empty() || contains(masks, port.name)) {
            (is_integer ? tensor.integers.assign(size, 1) : tensor.floats.assign(size, 1.0f));
        } else if (is_integer) {
            const std::int64_t values = std::max<std::int64_t>(1, port.name == LABELS ? manifest.classes() : port.size);
            for (std::size_t index = 0; index < size; ++index)
                tensor.integers.push_back(static_cast<std::int64_t>(index) % values);
        } else {
            tensor.floats = Noise(number).normal(size);
        }
        rows.arrays[port.name] = std::move(tensor);
        ++number;
    }
    return rows;
}

}  // namespace dit_runtime
