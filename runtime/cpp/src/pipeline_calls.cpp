// The pipeline's calls of its engines, and the memory of a device that they work in.
#include <algorithm>
#include <list>

#include "errors.hpp"
#include "pipeline.hpp"

namespace dit_runtime {
namespace {

// What the call gives; a device that is lost or full is said so.
template <typename Call>
auto with_graver_errors(const Call& call) {
    try {
        return call();
    } catch (const EngineError& error) {
        throw_if_grave(error.what());
        throw;
    }
}

}  // namespace

Memo Pipeline::memo(const Array& timesteps, const Rows& condition, const Rows& negative, const RunRows& compute,
                    std::size_t budget, const std::optional<Device>& device) {
    return Memo(manifest, compute ? compute : in_rows(runner()), timesteps, encode(condition), encode(negative), budget,
                device);
}

template <typename Call>
auto Pipeline::with_resident(const Stage& stage, const Call& call) {
    const Turns::Turn turn(opened_->turns);
    return call(dynamic_cast<Resident*>(&engine(stage)));
}

std::optional<Device> Pipeline::device() {
    if (options_.low_memory || on_cpu(manifest.step())) return std::nullopt;
    const std::shared_ptr<void> stream =
        with_resident(manifest.step(), [](Resident* engine) { return engine ? engine->stream() : nullptr; });
    if (!stream) return std::nullopt;
    const auto joins = [this, stream](const Stage& stage) {
        return with_resident(stage, [&](Resident* engine) { return engine && engine->stream() == stream; });
    };
    // No engine may be recording its work meanwhile, when an array is made or given back.
    const auto make = [this](const auto& call) {
        DeviceRows rows = with_graver_errors(
            [&] { return with_resident(manifest.step(), [&](Resident* engine) { return call(*engine); }); });
        const auto give_back = [opened = opened_, memory = rows.memory](DeviceMemory*) mutable {
            const CallScope scope({});  // it is given back whether or not the call is cancelled
            const Turns::Turn turn(opened->turns);
            memory.reset();
        };
        rows.memory = std::shared_ptr<DeviceMemory>(rows.memory.get(), give_back);
        return rows;
    };
    const auto put = [make](const Input& values) { return make([&](Resident& engine) { return engine.put(values); }); };
    const auto empty = [make](const Shape& shape, bool integers) {
        return make([&](Resident& engine) { return engine.empty(shape, integers); });
    };
    const auto home = [this](const DeviceRows& rows) {
        const Turns::Turn turn(opened_->turns);
        const Stopwatch waiting(&Timing::steps);  // for what is queued
        return with_graver_errors([&] { return rows.home(); });
    };
    const auto run = [this](const Stage& stage, const std::vector<Input>& inputs, const Into& into) {
        answer(stage, inputs, &into);
    };
    return Device{put, empty, home, joins, run};
}

bool Pipeline::updates_on_device() {
    const auto device = manifest.update ? this->device() : std::nullopt;
    return device && device->joins(*manifest.update);
}

// What the stage's engine gives, when it is this call's turn; with `into`, its outputs go there and none is returned.
std::map<std::string, Output> Pipeline::answer(const Stage& stage, std::vector<Input> inputs, const Into* into) {
    const auto& cancellation = current_call().cancellation;
    const auto cancelled = [&] { return cancellation && cancellation->cancelled(); };
    check_cancelled();
    const Turns::Turn turn(opened_->turns);
    Engine& engine = this->engine(stage);
    Resident* const resident = dynamic_cast<Resident*>(&engine);
    const auto own = [&](const DeviceRows& rows) { return resident && rows.memory->stream() == resident->stream(); };
    std::list<std::vector<unsigned char>> home;  // of arrays on a device that is not this engine's
    for (Input& input : inputs) {
        if (!input.device || own(*input.device)) continue;
        input.data = home.emplace_back(input.bytes()).data();
        input.device->memory->download(home.back().data(), input.device->stretches());
        input.device = nullptr;
    }
    if (into && !std::all_of(into->begin(), into->end(), [&](const auto& entry) { return own(entry.second); }))
        throw EngineError(text("the ", stage.name, "'s engine is not the one that this run's arrays are with"));
    const Stopwatch running(stage.runs == "step"  ? &Timing::steps
                            : stage.runs == "end" ? &Timing::end
                                                  : &Timing::before_loop);
    try {
        std::map<std::string, Output> outputs;
        {
            const Cancellation::Hook hook(cancellation, [&engine] { engine.stop(); });
            if (into)
                resident->run_into(inputs, *into);
            else
                outputs = engine.run(inputs);
        }
        if (cancelled()) engine.resume();
        return outputs;
    } catch (const EngineError& error) {
        if (cancelled()) {
            engine.resume();
            throw Stopped("cancelled");
        }
        const std::string message = text("the ", stage.name, " failed: ", error.what());
        throw_if_grave(message);
        throw EngineError(message);
    }
}

// Runs the stage on so many rows; refuses outputs that do not have the manifest's shapes.
std::map<std::string, std::vector<float>> Pipeline::run(const Stage& stage, const std::vector<Input>& inputs,
                                                        std::size_t rows) {
    std::map<std::string, Output> outputs = answer(stage, inputs);
    std::map<std::string, std::vector<float>> tensors;
    for (const TensorSpec& spec : stage.gives) {
        const auto output = outputs.find(spec.name);
        if (output == outputs.end())
            throw BundleError(text(folder.string(), ": ", stage.name, " has no output ", spec.name));
        const Shape expected = with_rows(rows, spec.row());
        if (output->second.shape != expected)
            throw EngineError(text("the ", stage.name, "'s ", spec.name, " has shape ", shown(output->second.shape),
                                   ", expected ", shown(expected)));
        tensors[spec.name] = std::move(output->second.values);
    }
    return tensors;
}

}  // namespace dit_runtime
