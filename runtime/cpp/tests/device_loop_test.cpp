// Runs whose state and conditioning stay on a GPU, on doubles of ONNX Runtime's CUDA provider and of CUDA. No GPU has
// run them. Mirrors tests/runtime/ort_cuda/test_loop.py.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>
#include <thread>

#include "ort_double.hpp"
#include "run.hpp"

namespace dit_runtime {
namespace {

// Memory of the host in the place of a device's.
struct HostMemory : DeviceMemory {
    explicit HostMemory(std::size_t size) : bytes(size) {}
    void download(void* target, const std::vector<Stretch>& stretches) override {
        for (const Stretch& stretch : stretches)
            std::memcpy(static_cast<char*>(target) + stretch.place, &bytes[stretch.start], stretch.bytes);
    }
    std::shared_ptr<void> stream() const override {
        static const auto only = std::make_shared<int>();
        return only;
    }
    std::vector<char> bytes;
};

// An engine whose arrays are the host's: the same loop, without a device.
class HostEngine : public Engine, public Resident {
  public:
    explicit HostEngine(std::unique_ptr<Engine> own) : own_(std::move(own)) {
        inputs = own_->inputs, outputs = own_->outputs;
    }
    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        std::vector<Input> home = arrays;
        std::list<std::vector<char>> values;
        for (Input& input : home) {
            if (!input.device) continue;
            input.data = values.emplace_back(input.bytes()).data();
            input.device->memory->download(values.back().data(), input.device->stretches());
            input.device = nullptr;
        }
        return own_->run(home);
    }
    void run_into(const std::vector<Input>& arrays, const Into& into) override {
        std::map<std::string, Output> made = run(arrays);
        for (const auto& [name, rows] : into) {
            EXPECT_EQ(rows.shape(), made.at(name).shape);
            const auto* const from = reinterpret_cast<const char*>(made.at(name).values.data());
            for (const Stretch& stretch : rows.stretches())
                std::memcpy(&static_cast<HostMemory&>(*rows.memory).bytes[stretch.start], from + stretch.place,
                            stretch.bytes);
        }
    }
    DeviceRows put(const Input& values) override {
        const DeviceRows rows = empty(values.shape, values.integers);
        std::memcpy(static_cast<HostMemory&>(*rows.memory).bytes.data(), values.data, values.bytes());
        return rows;
    }
    DeviceRows empty(const Shape& shape, bool integers) override {
        const std::size_t size = count(shape) * (integers ? sizeof(std::int64_t) : sizeof(float));
        return DeviceRows::all(std::make_shared<HostMemory>(size), shape, integers);
    }
    std::shared_ptr<void> stream() const override { return HostMemory(0).stream(); }

  private:
    const std::unique_ptr<Engine> own_;
};

}  // namespace

struct EngineDouble {
    static void stay(Pipeline& pipe) {
        std::vector<Stage> stages = pipe.manifest.stages;
        if (pipe.manifest.update) stages.push_back(*pipe.manifest.update);
        for (const Stage& stage : stages)
            pipe.opened_->engines[stage.name] = std::make_unique<HostEngine>(pipe.open(stage));
        pipe.options_.device = "cuda";  // they are open already
    }
};

namespace {

// Five samples, where an engine takes three.
Request five(std::int64_t steps = 25) {
    Request request;
    request.labels = {1, 3, 0, 4, 3};
    request.steps = steps;
    request.guidance = {3};
    request.seeds = {2};
    return request;
}

std::vector<Array> states(Pipeline& pipe, const Request& request, std::size_t budget = MEMO_BYTES) {
    Run run(pipe, request, {}, budget);
    std::vector<Array> all;
    for (bool more = true; more;) more = run.step(), all.push_back(run.state());
    return all;
}

using Sampling = Run;  // gtest's tests have a Run of their own

std::map<int, int> crossings() {  // by kind
    std::map<int, int> counts;
    for (const auto& copy : CudaDouble::here().copies) ++counts[copy.kind];
    return counts;
}

using DeviceLoop = OnDoubles;

TEST_F(DeviceLoop, WhatStaysIsSentOnce) {
    Options options;
    options.backend = "onnxruntime", options.device = "cuda";
    Pipeline pipe(CAPTIONED, options);
    const auto sent = [&](std::int64_t steps) {
        Request request;
        request.steps = steps;
        request.condition["captions"] = {{1, 5, 3}, std::vector<float>(15, 0.5f)};
        request.negative["captions"] = {{1, 5, 3}, std::vector<float>(15, 0.25f)};
        CudaDouble::here().copies.clear();
        pipe.latents(request);
        std::map<std::size_t, int> sizes;
        for (const auto& [kind, bytes] : CudaDouble::here().copies) sizes[bytes] += kind == cudaMemcpyHostToDevice;
        return sizes;
    };
    const TensorSpec& context = *find(pipe.manifest.step().reads, "context");  // it depends on no timestep
    const std::size_t bytes = 2 * count(context.row()) * sizeof(float);
    for (const std::int64_t steps : {2, 6}) {
        EXPECT_EQ(sent(steps)[bytes], 0);  // it is made there,
        const auto& copies = CudaDouble::here().copies;
        EXPECT_EQ(std::count_if(copies.begin(), copies.end(),
                                [&](const CudaDouble::Copy& copy) {
                                    return copy.kind == cudaMemcpyDeviceToDevice && copy.bytes == bytes;
                                }),
                  2);  // goes to the memo, and from there to where the step reads it
    }
}

TEST_F(DeviceLoop, TheBitsOfTheHost) {
    for (const std::size_t budget : {MEMO_BYTES, std::size_t{1}}) {  // all steps in a window, and one
        Pipeline host(BUNDLE, options_for("cpu"));
        const std::vector<Array> plain = states(host, five(), budget);
        EngineDouble::stay(host);
        const std::vector<Array> expected = states(host, five(), budget);
        Pipeline pipe(BUNDLE, options_for("cuda"));
        EXPECT_EQ(states(pipe, five(), budget), expected);
        ASSERT_EQ(expected.size(), 25u);
        double apart = 0, whole = 0;
        for (std::size_t i = 0; i < plain[24].size(); ++i) {
            apart += std::pow(plain[24][i] - expected[24][i], 2);
            whole += std::pow(plain[24][i], 2);
        }
        EXPECT_GT(apart, 0);  // the loop of matrices, in float32
        EXPECT_LT(std::sqrt(apart / whole), 1e-4);
    }
    std::set<std::string> streams;
    for (auto& options : provider.options) streams.insert(options["user_compute_stream"]);
    EXPECT_EQ(streams.size(), 2u);  // one a pipeline: all of its engines work in one order
}

TEST_F(DeviceLoop, NothingCrossesInAStep) {
    Pipeline pipe(BUNDLE, options_for("cuda"));
    std::vector<std::map<int, int>> crossed;
    for (const std::int64_t steps : {6, 12}) {  // in the same number of calls of the conditioner
        Request request = five(steps);
        request.labels = {1}, request.seeds = {1};
        CudaDouble::here().copies.clear();
        pipe.latents(request);
        crossed.push_back(crossings());
    }
    for (auto& counts : crossed) EXPECT_EQ(counts[cudaMemcpyDeviceToHost], 1);  // the result
    // Of the state, two arrays of zeros, matrices and weights; and the conditioner reads times and labels: three rows a
    // call, of two conditions a step.
    EXPECT_EQ(crossed[0][cudaMemcpyHostToDevice], 5 + 2 * 4);
    EXPECT_EQ(crossed[1][cudaMemcpyHostToDevice], 5 + 2 * 8);
    EXPECT_GT(crossed[0][cudaMemcpyDeviceToDevice], 6 * 5);
}

TEST_F(DeviceLoop, WhatNeedsTheHostRunsThere) {
    Pipeline host(BUNDLE, options_for("cpu")), pipe(BUNDLE, options_for("cuda"));
    std::vector<Request> requests(4, five(6));
    requests[0].eta = 0.5, requests[0].solver = "ddim";
    requests[1].guidance_policy = "rescale guidance_rescale=0.5";
    requests[2].cache = "taylorseer";
    requests[3].solver = "dpm++3";
    for (const Request& request : requests) EXPECT_EQ(states(pipe, request), states(host, request));
    CudaDouble::here().copies.clear();
    pipe.latents(requests[3]);
    // Of the state and the weights, for two parts in six steps; and the conditioner reads times and labels, of four
    // labels and none in six steps. What it gives stays there in this loop, too.
    EXPECT_EQ(crossings()[cudaMemcpyHostToDevice], 6 * 2 * 2 + 2 * (6 * 5 / 3));
}

TEST_F(DeviceLoop, AStepThatFailedCanBeTriedAgain) {
    Pipeline pipe(BUNDLE, options_for("cuda"));
    const std::vector<float> expected = pipe.latents(five(3));
    provider.calls = 0;
    EXPECT_EQ(pipe.latents(five(3)), expected);
    const int calls = provider.calls;
    EXPECT_EQ(calls, 5 + 3 * 2 * 2);  // of the conditioner; of denoiser and update for two parts
    for (int call = 1; call <= calls; ++call) {
        provider.calls = 0, provider.fails = {call, call + 1};
        Sampling run(pipe, five(3));
        int failures = 0;
        for (bool more = true; more;) {
            try {
                more = run.step();
            } catch (const EngineError& error) {
                EXPECT_NE(std::string(error.what()).find("failed: it failed"), std::string::npos);
                ++failures;
            }
        }
        EXPECT_EQ(failures, 2) << call;
        EXPECT_EQ(run.latents(), expected) << call;
    }
}

TEST_F(DeviceLoop, ARunThatIsCancelled) {
    Pipeline pipe(BUNDLE, options_for("cuda"));
    const std::vector<float> expected = pipe.latents(five());
    const std::size_t before = CudaDouble::here().memory.size();
    {
        Sampling run(pipe, five());
        for (int step = 0; step < 3; ++step) run.step();
        EXPECT_GT(CudaDouble::here().memory.size(), before);
        run.cancel();
        EXPECT_THROW(run.step(), Stopped);
        EXPECT_TRUE(std::all_of(run.state().begin(), run.state().end(), [](double x) { return std::isfinite(x); }));
        EXPECT_EQ(run.done(), 3);
        EXPECT_EQ(run.rows(), 6u);
    }
    EXPECT_EQ(CudaDouble::here().memory.size(), before);
    EXPECT_EQ(pipe.latents(five()), expected);
}

TEST_F(DeviceLoop, APreviewIsThatOfTheHost) {
    Pipeline host(BUNDLE, options_for("cpu")), pipe(BUNDLE, options_for("cuda"));
    Sampling theirs(host, five(4)), mine(pipe, five(4));
    EXPECT_EQ(mine.state(), theirs.state());
    EXPECT_THROW(mine.preview(), UsageError);
    for (int step = 0; step < 2; ++step) theirs.step(), mine.step();
    const std::vector<std::uint8_t> some = theirs.preview(), others = mine.preview();
    ASSERT_EQ(some.size(), others.size());
    int most = 0;
    for (std::size_t i = 0; i < some.size(); ++i) most = std::max(most, std::abs(some[i] - others[i]));
    EXPECT_LE(most, 1);
}

TEST_F(DeviceLoop, ThreadsTakeTurns) {
    Pipeline pipe(BUNDLE, options_for("cuda"));
    const std::vector<float> expected = pipe.latents(five(4));
    std::vector<std::vector<float>> made(3);
    std::vector<std::thread> threads;
    for (std::vector<float>& latents : made) threads.emplace_back([&] { latents = pipe.latents(five(4)); });
    for (std::thread& thread : threads) thread.join();
    for (const std::vector<float>& latents : made) EXPECT_EQ(latents, expected);
}

TEST_F(DeviceLoop, ArraysOfAClosedEngineAreRefused) {
    Pipeline pipe(BUNDLE, options_for("cuda"));
    Sampling run(pipe, five(4));
    run.step();
    pipe.close();
    EXPECT_THROW(run.step(), EngineError);
    EXPECT_EQ(pipe.latents(five(4)).size(), 5 * count(pipe.manifest.state().shape));
}

TEST_F(DeviceLoop, ValuesThatAreNotFiniteAreAnError) {
    Request request = five(4);
    request.latents = std::vector<float>(5 * count(read(BUNDLE).state().shape), 3e38f);  // no float has twice that
    Pipeline pipe(BUNDLE, options_for("cuda"));
    EXPECT_THROW(pipe.latents(request), NotFinite);
}

}  // namespace
}  // namespace dit_runtime
