// The engine of ONNX Runtime's CUDA provider on doubles of that provider and of CUDA. No GPU has run it. Mirrors
// tests/runtime/ort_cuda/test_engine.py; device_loop_test.cpp has the loop.
#include <algorithm>
#include <cmath>

#include "ort_double.hpp"
#include "verify.hpp"

namespace dit_runtime {
namespace {

class OrtCuda : public OnDoubles {
  protected:
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
    const std::unique_ptr<OrtEnv, ort::Release<OrtEnv, &OrtApi::ReleaseEnv>> owned(environment);
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
