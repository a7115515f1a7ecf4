// The engine of ONNX Runtime's CUDA provider on doubles of that provider and of CUDA: graphs run on the CPU, in memory
// that the test calls the GPU's. No GPU has run it. Mirrors tests/runtime/test_ort_cuda.py.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <set>

#include "ort.hpp"
#include "pipeline.hpp"
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

    // All figures of a bundle's verification.
    static std::vector<double> figures(const char* bundle, const char* device) {
        Options options;
        options.backend = "onnxruntime", options.device = device, options.threads = 1;
        Pipeline pipe(bundle, options);
        std::vector<double> values;
        verify(pipe, [&](const Figure& figure) {
            EXPECT_TRUE(figure.passed()) << figure.name() << ": " << figure.value;
            values.push_back(figure.value);
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
    EXPECT_EQ(sent(2)[bytes], 1);
    EXPECT_EQ(sent(6)[bytes], 1);  // another run has another
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
        std::string lines;
        set_log([&](Severity, const std::string& line) { lines += line; }, Severity::WARNING);
        const std::vector<double> values = figures(BUNDLE, "cuda");
        set_log({}, Severity::WARNING);
        EXPECT_EQ(lines.rfind("no CUDA graph of ONNX Runtime's work", 0), 0u) << lines;
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
