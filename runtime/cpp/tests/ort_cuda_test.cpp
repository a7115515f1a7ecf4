// The engine of ONNX Runtime's CUDA provider on doubles of that provider and of CUDA: graphs run on the CPU, in memory
// that the test calls the GPU's. No GPU has run it. Mirrors tests/runtime/test_ort_cuda.py.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <list>
#include <map>
#include <set>
#include <thread>

#include "ort.hpp"
#include "pipeline.hpp"
#include "run.hpp"
#include "verify.hpp"

namespace {

using Place = std::pair<const char*, const char*>;  // provider, operator

// What the tests ask for, and what was done.
struct Provider {
    bool starts = true, captures = true, records = true, old = false;
    bool places = true;  // else the library itself says where nodes run
    std::vector<Place> placements = {{"CUDAExecutionProvider", "MatMul"}, {"CPUExecutionProvider", "Gather"}};
    std::vector<std::map<std::string, std::string>> options;  // by session
    std::map<const OrtSession*, cudaStream_t> streams;
    std::vector<int> memory;  // numbers of the GPUs
    std::map<const OrtRunOptions*, std::string> graphs;
    std::map<const OrtIoBinding*, std::vector<std::string>> runs;  // the graph of each, by binding
    std::vector<const Place*> pointers = {};
    std::set<int> fails;  // numbers of runs
    int calls = 0;        // runs
};
Provider provider;

// The library's own functions.
const OrtApi& real() {
    static const auto base =
        reinterpret_cast<const OrtApiBase* (*)()>(dlsym(dlopen(ONNXRUNTIME, RTLD_NOW), "OrtGetApiBase"))();
    return *base->GetApi(ORT_API_VERSION);
}

OrtStatus* failure(const char* message) { return real().CreateStatus(ORT_FAIL, message); }

const OrtApi* ORT_API_CALL doubled(std::uint32_t version) NO_EXCEPTION {
    constexpr std::size_t ENTRIES = 414, PLACE = 407;  // of version 24, and of the first that says where nodes run
    static const void* table[ENTRIES];
    std::memcpy(table, &real(), sizeof(table));
    auto& api = reinterpret_cast<OrtApi&>(table);
    api.GetAvailableProviders = [](char*** names, int* length) noexcept -> OrtStatus* {
        static char cuda[] = "CUDAExecutionProvider", cpu[] = "CPUExecutionProvider";
        static char* all[] = {cuda, cpu};
        return *names = all, *length = 2, nullptr;
    };
    api.ReleaseAvailableProviders = [](char**, int) noexcept -> OrtStatus* { return nullptr; };
    api.CreateCUDAProviderOptions = [](OrtCUDAProviderOptionsV2** made) noexcept -> OrtStatus* {
        provider.options.emplace_back();
        return *made = reinterpret_cast<OrtCUDAProviderOptionsV2*>(&provider), nullptr;
    };
    api.UpdateCUDAProviderOptions = [](OrtCUDAProviderOptionsV2*, const char* const* keys, const char* const* values,
                                       std::size_t length) noexcept -> OrtStatus* {
        for (std::size_t index = 0; index < length; ++index) provider.options.back()[keys[index]] = values[index];
        return nullptr;
    };
    api.ReleaseCUDAProviderOptions = [](OrtCUDAProviderOptionsV2*) noexcept {};
    api.SessionOptionsAppendExecutionProvider_CUDA_V2 = [](OrtSessionOptions*,
                                                           const OrtCUDAProviderOptionsV2*) noexcept -> OrtStatus* {
        return provider.starts ? nullptr : failure("libcudnn.so.9: no such file");
    };
    api.CreateSession = [](const OrtEnv* environment, const char* path, const OrtSessionOptions* settings,
                           OrtSession** made) noexcept -> OrtStatus* {
        if (provider.options.empty()) return real().CreateSession(environment, path, settings, made);
        auto& options = provider.options.back();
        if (!provider.captures && options["enable_cuda_graph"] == "1")
            return failure("This session cannot use the graph capture feature as requested");
        OrtStatus* const status = real().CreateSession(environment, path, settings, made);
        if (!status)
            provider.streams[*made] = reinterpret_cast<cudaStream_t>(std::stoull(options["user_compute_stream"]));
        return status;
    };
    api.CreateMemoryInfo = [](const char* name, OrtAllocatorType type, int number, OrtMemType kind,
                              OrtMemoryInfo** made) noexcept -> OrtStatus* {
        if (name != std::string("Cuda")) return failure(name);
        provider.memory.push_back(number);
        return real().CreateMemoryInfo("Cpu", type, 0, kind, made);
    };
    api.AddRunConfigEntry = [](OrtRunOptions* settings, const char* key, const char* value) noexcept -> OrtStatus* {
        if (key == std::string("gpu_graph_id")) provider.graphs[settings] = value;
        return real().AddRunConfigEntry(settings, key, value);
    };
    api.RunWithBinding = [](OrtSession* session, const OrtRunOptions* settings,
                            const OrtIoBinding* binding) noexcept -> OrtStatus* {
        CudaDouble::here().finish(provider.streams.at(session));
        const std::string& graph = provider.graphs.at(settings);
        provider.runs[binding].push_back(graph);
        if (provider.fails.count(++provider.calls)) return failure("it failed");
        if (!provider.records && graph != "-1") return failure("it cannot be captured");
        return real().RunWithBinding(session, settings, binding);
    };
    if (!provider.places) return &api;
    const auto patch = [&](std::size_t place, auto* function) { table[place] = reinterpret_cast<void*>(function); };
    patch(
        PLACE, +[](const OrtSession*, const Place* const** parts, std::size_t* length) -> OrtStatus* {
            provider.pointers.clear();
            for (const Place& place : provider.placements) provider.pointers.push_back(&place);
            return *parts = provider.pointers.data(), *length = provider.pointers.size(), nullptr;
        });
    patch(PLACE + 1, +[](const Place* part, const char** name) -> OrtStatus* { return *name = part->first, nullptr; });
    patch(
        PLACE + 2, +[](const Place* part, const Place* const** nodes, std::size_t* length) -> OrtStatus* {
            static thread_local const Place* node;
            return node = part, *nodes = &node, *length = 1, nullptr;
        });
    patch(PLACE + 5, +[](const Place* node, const char** name) -> OrtStatus* { return *name = node->second, nullptr; });
    return version == 24 && provider.old ? nullptr : &api;
}

const char* ORT_API_CALL version_string() NO_EXCEPTION { return "1.31.1"; }

}  // namespace

// In the place of the library's.
extern "C" const OrtApiBase* ORT_API_CALL OrtGetApiBase() NO_EXCEPTION {
    static const OrtApiBase base = {doubled, version_string};
    return &base;
}

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
    }
};

namespace {

Options options_for(const char* device) {
    Options options;
    options.backend = "onnxruntime", options.device = device, options.threads = 1;
    return options;
}

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

using Sampling = Run;  // a test has a Run of its own

std::map<int, int> crossings() {  // by kind
    std::map<int, int> counts;
    for (const auto& copy : CudaDouble::here().copies) ++counts[copy.kind];
    return counts;
}

class OrtCuda : public testing::Test {
  protected:
    void SetUp() override {
        CudaDouble::here() = {};
        provider = {};
    }
    void TearDown() override {
        EXPECT_TRUE(CudaDouble::here().memory.empty());
        EXPECT_TRUE(CudaDouble::here().objects.empty());
        EXPECT_EQ(CudaDouble::here().foreign, 0);
        EXPECT_EQ(CudaDouble::here().pageable, 0);
        EXPECT_EQ(CudaDouble::current(), 0);
    }

    // All figures of a bundle's verification; those of a whole run only to five digits, for the loop on a device is
    // float32.
    static std::vector<double> figures(const char* bundle, const char* device) {
        Pipeline pipe(bundle, options_for(device));
        std::vector<double> values;
        verify(pipe, [&](const Figure& figure) {
            EXPECT_TRUE(figure.passed()) << figure.name() << ": " << figure.value;
            values.push_back(figure.stage == "run" ? std::round(1e5 * figure.value) : figure.value);
        });
        return values;
    }
    static std::unique_ptr<Engine> open(const char* device) {
        const Manifest manifest = read(BUNDLE);
        const Stage& stage = manifest.step();
        Options options;
        options.device = device;
        return open_ort({Path(BUNDLE) / stage.onnx}, stage, options);
    }
    static void run(Engine& engine, std::int64_t rows) {
        static const Manifest manifest = read(BUNDLE);
        static const std::vector<float> zeros(1 << 18);
        std::vector<Input> inputs;
        for (const TensorSpec& spec : manifest.step().reads) {
            Shape shape = with_rows(static_cast<std::size_t>(rows), spec.row());
            if (spec.starts("groups")) shape.insert(shape.begin(), 2);
            inputs.push_back({spec.name, shape, zeros.data()});
        }
        engine.run(inputs);
    }
    // A refusal's sentence, from the bundle's folder on.
    static std::string refused(const char* device) {
        try {
            open(device);
        } catch (const UsageError& error) {
            const std::string said = error.what(), folder = std::string(BUNDLE) + "/";
            return said.rfind(folder, 0) == 0 ? said.substr(folder.size()) : said;
        }
        return "";
    }
};

TEST_F(OrtCuda, ComputesWhatTheCpuDoes) {
    const std::vector<const char*> bundles = {BUNDLE, CAPTIONED, WAVE, VIDEO, FREE};
    std::vector<std::vector<double>> values;
    for (const char* const bundle : bundles) values.push_back(figures(bundle, "cpu"));
    for (std::size_t index = 0; index < bundles.size(); ++index)
        EXPECT_EQ(figures(bundles[index], "cuda"), values[index]) << bundles[index];
    for (const auto& [binding, graphs] : provider.runs) {
        EXPECT_EQ(graphs.front(), "-1");  // which sets everything up, also where a later binding has the same address
        for (std::size_t run = 2; run < graphs.size(); ++run)
            EXPECT_TRUE(graphs[run] == graphs[run - 1] || graphs[run] == "-1" || graphs[run - 1] == "-1");
    }
}

TEST_F(OrtCuda, EachShapeHasAGraph) {
    const auto engine = open("cuda");
    for (int step = 0; step < 3; ++step)
        for (const std::int64_t rows : {2, 2, 1}) run(*engine, rows);
    std::vector<std::vector<std::string>> runs;
    for (const auto& [binding, graphs] : provider.runs) runs.push_back(graphs);
    std::sort(runs.begin(), runs.end());
    EXPECT_EQ(runs, (std::vector<std::vector<std::string>>{{"-1", "1", "1", "1", "1", "1"}, {"-1", "2", "2"}}));
}

TEST_F(OrtCuda, AFewShapesKeepTheirMemory) {
    const auto engine = open("cuda");
    for (int step = 0; step < 3; ++step)
        for (std::int64_t rows = 1; rows <= 40; ++rows) run(*engine, rows);
    for (std::int64_t rows = 1; rows <= 40; ++rows) run(*engine, rows), run(*engine, rows);
    std::set<std::string> graphs;
    for (const auto& [binding, runs] : provider.runs) graphs.insert(runs.begin(), runs.end());
    EXPECT_EQ(graphs.size(), 16u + 1);  // and the runs that have none
    std::size_t arrays = 0;
    for (const auto& [memory, block] : CudaDouble::here().memory) arrays += !block.pinned;
    EXPECT_LE(arrays, 17 * (engine->inputs.size() + engine->outputs.size()));
}

TEST_F(OrtCuda, WhatStaysIsSentOnce) {
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

TEST_F(OrtCuda, TheBitsOfTheHost) {
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

TEST_F(OrtCuda, NothingCrossesInAStep) {
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

TEST_F(OrtCuda, WhatNeedsTheHostRunsThere) {
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

TEST_F(OrtCuda, AStepThatFailedCanBeTriedAgain) {
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

TEST_F(OrtCuda, ARunThatIsCancelled) {
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

TEST_F(OrtCuda, APreviewIsThatOfTheHost) {
    Pipeline host(BUNDLE, options_for("cpu")), pipe(BUNDLE, options_for("cuda"));
    Sampling theirs(host, five(4)), mine(pipe, five(4));
    EXPECT_EQ(mine.state(), theirs.state());
    EXPECT_THROW(mine.preview(), UsageError);
    for (int step = 0; step < 2; ++step) theirs.step(), mine.step();
    const std::vector<std::uint8_t> some = theirs.preview(), others = mine.preview();
    ASSERT_EQ(some.size(), others.size());
    for (std::size_t i = 0; i < some.size(); ++i) EXPECT_LE(std::abs(some[i] - others[i]), 1);
}

TEST_F(OrtCuda, ThreadsTakeTurns) {
    Pipeline pipe(BUNDLE, options_for("cuda"));
    const std::vector<float> expected = pipe.latents(five(4));
    std::vector<std::vector<float>> made(3);
    std::vector<std::thread> threads;
    for (std::vector<float>& latents : made) threads.emplace_back([&] { latents = pipe.latents(five(4)); });
    for (std::thread& thread : threads) thread.join();
    for (const std::vector<float>& latents : made) EXPECT_EQ(latents, expected);
}

TEST_F(OrtCuda, ArraysOfAClosedEngineAreRefused) {
    Pipeline pipe(BUNDLE, options_for("cuda"));
    Sampling run(pipe, five(4));
    run.step();
    pipe.close();
    EXPECT_THROW(run.step(), EngineError);
    EXPECT_EQ(pipe.latents(five(4)).size(), 5 * count(pipe.manifest.state().shape));
}

TEST_F(OrtCuda, ValuesThatAreNotFiniteAreAnError) {
    Request request = five(4);
    request.latents = std::vector<float>(5 * count(read(BUNDLE).state().shape), 3e38f);  // no float has twice that
    Pipeline pipe(BUNDLE, options_for("cuda"));
    EXPECT_THROW(pipe.latents(request), NotFinite);
}

TEST_F(OrtCuda, TheProvidersOptions) {
    open("cuda:1");
    ASSERT_EQ(provider.options.size(), 1u);
    std::map<std::string, std::string> options = provider.options[0];
    EXPECT_GT(options["user_compute_stream"].size(), 3u);
    options.erase("user_compute_stream");
    EXPECT_EQ(options, (std::map<std::string, std::string>{{"device_id", "1"},
                                                           {"use_tf32", "0"},
                                                           {"cudnn_conv_algo_search", "HEURISTIC"},
                                                           {"cudnn_conv_use_max_workspace", "1"},
                                                           {"enable_cuda_graph", "1"}}));
    EXPECT_EQ(provider.memory, std::vector<int>{1});
}

TEST_F(OrtCuda, Refusals) {
    Stage stage = read(BUNDLE).step();
    stage.precision = "int8";
    Options options;
    options.backend = "onnxruntime", options.device = "cuda:1";
    EXPECT_THROW(choose(stage, options), UsageError);
    EXPECT_EQ(refused("cuda:2"), "device 'cuda:2' did not start here: cudaSetDevice: cudaErrorInvalidDevice");
    EXPECT_EQ(refused("cuda:x"), "device 'cuda:x' is no NVIDIA GPU; expected cuda, cuda:0, cuda:1, …");
    EXPECT_EQ(refused("rocm"), "device 'rocm' is not in this ONNX Runtime; here: cpu, cuda");
    provider.placements = {{"CPUExecutionProvider", "MatMul"},
                           {"CPUExecutionProvider", "FusedConv"},
                           {"CPUExecutionProvider", "MatMul"},
                           {"CPUExecutionProvider", "Shape"}};
    EXPECT_EQ(refused("cuda"),
              "denoiser.onnx: ONNX Runtime has no CUDA kernel for 1 FusedConv, 2 MatMul; use device cpu");
    EXPECT_EQ(refused("cpu"), "");
    provider.old = true;
    EXPECT_EQ(refused("cuda"), "ONNX Runtime 1.31.1 does not say where its nodes run; device cuda needs 1.24 or later");
    provider = {};
    provider.starts = false;
    EXPECT_EQ(refused("cuda"), "device 'cuda' did not start here: libcudnn.so.9: no such file");
}

TEST_F(OrtCuda, WhatCannotBeCapturedRuns) {
    for (bool Provider::* const able : {&Provider::captures, &Provider::records}) {
        provider = {};
        provider.*able = false;
        testing::internal::CaptureStderr();
        const std::vector<double> values = figures(BUNDLE, "cuda");
        EXPECT_EQ(testing::internal::GetCapturedStderr().rfind("no CUDA graph of ONNX Runtime's work", 0), 0u);
        provider = {};
        EXPECT_EQ(values, figures(BUNDLE, "cpu"));
    }
}

TEST_F(OrtCuda, WhatDoesNotFitLeavesNothing) {
    for (int room = 0; room < 12; ++room) {
        CudaDouble::here().room = room;
        Options options;
        options.backend = "onnxruntime", options.device = "cuda:1";
        Pipeline pipe(BUNDLE, options);
        Request request;
        request.labels = {1};
        request.steps = 2;
        EXPECT_THROW(pipe.latents(request), EngineError) << room;
        EXPECT_EQ(CudaDouble::current(), 0);
        CudaDouble::here().room = -1;
        EXPECT_EQ(pipe.latents(request).size(), count(pipe.manifest.state().shape));
    }
}

TEST(Placement, ONNXRuntimeSaysIt) {
    OrtEnv* environment = nullptr;
    ort::check(real().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "test", &environment));
    const ort::Environment owned(environment);
    OrtSessionOptions* settings = nullptr;
    ort::check(real().CreateSessionOptions(&settings));
    const ort::Settings kept(settings);
    ort::check(real().AddSessionConfigEntry(settings, "session.record_ep_graph_assignment_info", "1"));
    OrtSession* session = nullptr;
    ort::check(real().CreateSession(environment, (Path(BUNDLE) / "denoiser.onnx").c_str(), settings, &session));
    const ort::Session open(session);
    provider.places = false;
    const auto all = ort::placements(session);
    EXPECT_TRUE(std::any_of(all.begin(), all.end(), [](const ort::Placement& placement) {
        return placement.provider == "CPUExecutionProvider" && placement.op == "MatMul";
    }));
}

}  // namespace
}  // namespace dit_runtime
