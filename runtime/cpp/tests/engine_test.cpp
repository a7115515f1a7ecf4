// Refusals before an engine is opened, which mirror those in tests/tensorrt/test_refusals.py; and the rows of
// OpenVINO's engine, which mirror tests/runtime/test_backends.py.
#include "engine.hpp"

#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <future>
#include <map>
#include <nlohmann/json.hpp>

#include "bundle.hpp"
#include "errors.hpp"
#include "noise.hpp"
#include "pipeline.hpp"

namespace dit_runtime {
namespace {

const Gpu HERE{"1.7.1", 13020, "8.9"};
const Built BUILT{"1.7.1.116", 13, {"8.6", "8.9"}, false};

Built changed(const std::function<void(Built&)>& change) {
    Built built = BUILT;
    change(built);
    return built;
}

std::string refused(const Built& built, const Gpu& here = HERE) { return refusal("tensorrt-rtx", built, here); }

TEST(Refusal, WhatFitsIsNotRefused) {
    EXPECT_EQ(refused(BUILT), "");
    EXPECT_EQ(refused(BUILT, {"1.7.1", 14000, "8.6"}), "");
    EXPECT_EQ(refused(changed([](Built& built) { built.compute_capabilities.clear(); })), "");
    EXPECT_EQ(refused(changed([](Built& built) { built.compute_capabilities = {"8.0+"}; }), {"1.7.1", 13000, "12.0"}),
              "");
}

TEST(Refusal, AnotherVersion) {
    EXPECT_EQ(refused(changed([](Built& built) { built.version = "1.7.0"; })),
              "built by tensorrt-rtx 1.7.0, and here is 1.7.1");
    EXPECT_EQ(refused(Built{}), "built by tensorrt-rtx of no known version, and here is 1.7.1");
    for (const auto& [version, fine] :
         std::map<std::string, bool>{{"1.6.9", true}, {"1.7.1", true}, {"1.8.0", false}, {"0.9", false}}) {
        const Built built = changed([version = version](Built& built) {
            built.version = version;
            built.version_compatible = true;
        });
        EXPECT_EQ(refused(built).empty(), fine) << version;
    }
}

TEST(Refusal, AnotherDriverOrGpu) {
    EXPECT_EQ(refused(BUILT, {"1.7.1", 0, "8.9"}), "no NVIDIA driver");
    EXPECT_EQ(refused(BUILT, {"1.7.1", 12080, "8.9"}), "the NVIDIA driver has CUDA 12, expected 13 or later");
    EXPECT_EQ(refused(BUILT, {"1.7.1", 13000, ""}), "no NVIDIA GPU");
    EXPECT_EQ(refused(BUILT, {"1.7.1", 13000, "9.0"}), "compute capability 9.0 here, and the engine is for 8.6, 8.9");
    EXPECT_EQ(refused(changed([](Built& built) { built.compute_capabilities = {"8.0+"}; }), {"1.7.1", 13000, "7.5"}),
              "compute capability 7.5 here, and the engine is for 8.0+");
}

TEST(Refusal, ADeviceIsANumber) {
    for (const auto& [device, number] :
         std::map<std::string, int>{{"", 0}, {"cuda", 0}, {"CUDA", 0}, {"cuda:0", 0}, {"Cuda:12", 12}})
        EXPECT_EQ(gpu_number(device), number) << device;
    for (const char* const device : {"cpu", "0", "cuda:", "cuda:-1", "cuda:1.5", "cuda:1x", "cuda:99999999999", "a:1"})
        EXPECT_THROW(gpu_number(device), UsageError) << device;
    for (const char* const device : {"cuda", "CUDA", "Cuda:1", "cuda:x"}) EXPECT_TRUE(on_cuda(device)) << device;
    for (const char* const device : {"", "cpu", "cudart", "gpu"}) EXPECT_FALSE(on_cuda(device)) << device;
}

TEST(Files, OnnxRuntimeHasAFormForCuda) {
    Stage stage;
    stage.onnx = "step.onnx";
    stage.engines = {{"onnxruntime", {"step.onnxruntime.onnx"}}, {"openvino", {"step.openvino.onnx"}}};
    const Backend ort{"onnxruntime", true, {}, nullptr, nullptr}, ov{"openvino", true, {}, nullptr, nullptr};
    const std::vector<std::string> portable = {"step.onnx", "step.onnx.data"};
    EXPECT_EQ(files_for(stage, ort, ""), stage.engines["onnxruntime"]);
    EXPECT_EQ(files_for(stage, ort, "cpu"), stage.engines["onnxruntime"]);
    EXPECT_EQ(files_for(stage, ort, "cuda:1"), portable);
    EXPECT_EQ(files_for(stage, ov, "cuda"), stage.engines["openvino"]);
    stage.engines["onnxruntime-cuda"] = {"step.onnxruntime-cuda.onnx"};
    EXPECT_EQ(files_for(stage, ort, "cuda"), stage.engines["onnxruntime-cuda"]);
}

TEST(Refusal, TheManifestSaysHowAnEngineWasBuilt) {
    using Json = nlohmann::json;
    const BundleCopy copy;
    copy.edit([](Json& table) {
        table["built_with"]["engines"]["tensorrt"]["denoiser"] = {{"version", "11.4.0"},
                                                                  {"cuda", 13},
                                                                  {"compute_capabilities", Json::array({"8.9"})},
                                                                  {"tuning", {{"weight_streaming", true}}}};
        table["built_with"]["engines"]["tensorrt"]["update"] = {{"version", "11.4.0"}};
    });
    const Manifest manifest = read(copy.folder);
    const Built& built = manifest.step().built.at("tensorrt");
    EXPECT_EQ(built.version, "11.4.0");
    EXPECT_EQ(built.cuda, 13);
    EXPECT_EQ(built.compute_capabilities, (std::vector<std::string>{"8.9"}));
    EXPECT_FALSE(built.version_compatible);
    EXPECT_TRUE(built.weight_streaming);
    EXPECT_TRUE(manifest.stages.at(0).built.empty());
    for (const Json& odd :
         {Json(3), Json(Json::array()), Json{{"version", 3}}, Json{{"compute_capabilities", "8.9"}}}) {
        copy.edit([&](Json& table) { table["built_with"]["engines"]["tensorrt"]["denoiser"] = odd; });
        EXPECT_THROW(read(copy.folder), BundleError) << odd;
    }
}

// It is for engines on a device: here solvers step on the host.
TEST(Refusal, TheUpdateStageIsLeftAlone) {
    const BundleCopy copy;
    EXPECT_NE(copy.bytes("manifest.json").find("\"update\""), std::string::npos);
    for (const Stage& stage : read(copy.folder).stages) EXPECT_NE(stage.runs, "update");
}

TEST(Refusal, PrecisionsWithoutKernels) {
    const auto chosen = [](const std::string& precision, const std::string& device) {
        Stage stage;
        stage.precision = precision;
        Options options;
        options.backend = "onnxruntime";
        options.device = device;
        try {
            return choose(stage, options).name;
        } catch (const UsageError& error) {
            return std::string(error.what());
        }
    };
    if (backends()[0].name != "onnxruntime") GTEST_SKIP() << "built without ONNX Runtime";
    EXPECT_EQ(chosen("bf16", ""), "bf16 has no kernels in ONNX Runtime's CPU provider; use device cuda");
    EXPECT_EQ(chosen("bf16", "CUDA"), "onnxruntime");
    EXPECT_EQ(chosen("int8", "cuda"),
              "int8 has no kernels in ONNX Runtime's CUDA provider; build fp16, or use device cpu");
    EXPECT_EQ(chosen("int8", "cpu"), "onnxruntime");
}

TEST(Engines, AreMadeWhileTheLastOneIsFreed) {
    const Manifest manifest = read(BUNDLE);
    const Backend& backend = backends()[0];
    if (backend.name != "onnxruntime") GTEST_SKIP() << "built without ONNX Runtime";
    const auto make = [&] {
        for (int time = 0; time < 400; ++time)
            backend.open({Path(BUNDLE) / manifest.step().onnx}, manifest.step(), Options{});
    };
    auto other = std::async(std::launch::async, make);
    EXPECT_NO_THROW(make());
    EXPECT_NO_THROW(other.get());
}

// NULL where this library does not have it.
const Backend* openvino() {
    for (const Backend& known : backends())
        if (known.name == "openvino") return &known;
    return nullptr;
}

using Values = std::map<std::string, std::vector<float>>;

// The step stage of a bundle on OpenVINO, and inputs for it.
class Rows : public ::testing::TestWithParam<const char*> {
  protected:
    void SetUp() override {
        if (!backend) GTEST_SKIP() << "OpenVINO was not found when the library was built";
        stage = manifest.step();
    }

    static Options of_threads(int threads) {
        Options options;
        options.threads = threads;
        options.at_once = 2;
        return options;
    }

    std::unique_ptr<Engine> open(const Options& options) const {
        return backend->open({Path(GetParam()) / stage.onnx}, stage, options);
    }

    std::unique_ptr<Engine> open(int threads) const { return open(of_threads(threads)); }

    // The rows of these samples among 3, and the first of the 2 groups or both.
    Values run(Engine& engine, const std::vector<std::size_t>& samples, std::size_t groups) const {
        std::vector<std::vector<float>> arrays;
        std::vector<Input> inputs;
        for (const TensorSpec& spec : stage.reads) {
            const bool grouped = spec.starts("groups");
            const std::size_t row = count(spec.row());
            Shape shape = with_rows(samples.size(), spec.row());
            if (grouped) shape.insert(shape.begin(), static_cast<std::int64_t>(groups));
            const std::vector<float> all = Noise(arrays.size()).normal(6 * row);
            arrays.emplace_back();
            for (std::size_t group = 0; group < (grouped ? groups : 1); ++group)
                for (const std::size_t sample : samples) {
                    const auto first = all.begin() + static_cast<std::ptrdiff_t>((3 * group + sample) * row);
                    arrays.back().insert(arrays.back().end(), first, first + static_cast<std::ptrdiff_t>(row));
                }
            inputs.push_back({spec.name, shape, nullptr});
        }
        for (std::size_t i = 0; i < inputs.size(); ++i) inputs[i].data = arrays[i].data();
        Values values;
        for (auto& [name, output] : engine.run(inputs)) {
            EXPECT_EQ(output.shape, with_rows(samples.size(), find(stage.gives, name)->row())) << name;
            values[name] = std::move(output.values);
        }
        return values;
    }

    const Manifest manifest = read(GetParam());
    const Backend* const backend = openvino();
    Stage stage;
};

INSTANTIATE_TEST_SUITE_P(Bundles, Rows, ::testing::Values(BUNDLE, CAPTIONED, WAVE, VIDEO));

// Each sample has a weight of its own: batch, threads and what ran before leave its bits as they are.
TEST_P(Rows, AreTheSameBitsAlone) {
    Values alone[2], joined[2];  // of sample 1, and of all; without guidance, and with it
    for (const std::size_t sample : {0, 1, 2})
        for (const std::size_t groups : {1, 2}) {
            const Values values = run(*open(1), {sample}, groups);
            for (const auto& [name, row] : values) {
                std::vector<float>& rows = joined[groups - 1][name];
                rows.insert(rows.end(), row.begin(), row.end());
            }
            if (sample == 1) alone[groups - 1] = values;
        }
    EXPECT_NE(alone[0], alone[1]) << "guidance changes nothing";
    for (Options options : {of_threads(1), of_threads(2), of_threads(3)}) {
        const auto engine = open(options);
        for (const std::size_t groups : {2, 1, 2}) {
            EXPECT_EQ(run(*engine, {0, 1, 2}, groups), joined[groups - 1]) << options.threads << " threads";
            EXPECT_EQ(run(*engine, {1}, groups), alone[groups - 1]) << options.threads << " threads";
        }
    }
    Options lean = of_threads(2);
    lean.low_memory = true;
    EXPECT_EQ(run(*open(lean), {0, 1, 2}, 2), joined[1]);
}

TEST_P(Rows, AnArrayOfAnotherShapeIsRefused) {
    const auto engine = open(2);
    const Values before = run(*engine, {0, 1}, 2);
    const Stage right = stage;
    for (TensorSpec& spec : stage.reads)
        if (spec.starts("batch") && spec.name != GUIDANCE) spec.shape.push_back(std::int64_t{3});
    EXPECT_THROW(run(*engine, {0, 1}, 2), std::runtime_error);
    stage = right;
    EXPECT_EQ(run(*engine, {0, 1}, 2), before);
}

// Whatever this machine's CPU has: without bf16, both precisions are fp32, and a line says so of what is called bf16.
TEST_P(Rows, WithoutBf16FloatsAreFp32) {
    const Values fp32 = run(*open(1), {0, 1}, 2);
    Options options = of_threads(1);
    for (const char* const precision : {"bf16", "int8"}) {
        stage.precision = precision;
        options.capabilities = {"FP32", "INT8"};
        EXPECT_EQ(run(*open(options), {0, 1}, 2), fp32) << precision;
        EXPECT_EQ(backend->note(precision, options).empty(), precision == std::string("int8"));
        options.capabilities = {"FP32", "INT8", "BF16"};
        EXPECT_EQ(backend->note(precision, options), "");
        const Values narrow = run(*open(options), {0, 1}, 2);
        if (!backend->note("bf16", of_threads(1)).empty()) continue;  // this CPU does not have it
        EXPECT_NE(narrow, fp32) << precision;
    }
    options.capabilities = {"FP32"};
    EXPECT_EQ(backend->note("fp32", options), "");
    EXPECT_EQ(backend->note("bf16", options),
              "this CPU has no bf16: openvino computes in fp32, and nothing is gained over fp32");
}

TEST(Note, IsTheBundlesWhereAStageComputesInFp32) {
    if (!openvino()) GTEST_SKIP() << "OpenVINO was not found when the library was built";
    const BundleCopy copy;
    Options options;
    options.backend = "openvino";
    options.capabilities = {"FP32", "INT8"};
    EXPECT_EQ(Pipeline(copy.folder, options).note(), "");
    copy.edit([](nlohmann::json& table) { ::stage(table, "denoiser")["precision"] = "bf16"; });
    const std::string line = "this CPU has no bf16: openvino computes in fp32, and nothing is gained over fp32";
    EXPECT_EQ(Pipeline(copy.folder, options).note(), line);
    options.low_memory = true;
    EXPECT_EQ(Pipeline(copy.folder, options).note(), line);
    options.capabilities->push_back("BF16");
    EXPECT_EQ(Pipeline(copy.folder, options).note(), "");
}

#ifdef __linux__
// One CPU runs a row at a time, so that what was compiled for one row is enough; the bundle is gone.
TEST_P(Rows, CountTheCpusOfTheirThread) {
    if (GetParam() == std::string(WAVE)) return;  // which is compiled when it runs
    cpu_set_t all, first;
    ASSERT_EQ(sched_getaffinity(0, sizeof all, &all), 0);
    CPU_ZERO(&first);
    int cpu = 0;
    while (!CPU_ISSET(cpu, &all)) ++cpu;
    CPU_SET(cpu, &first);
    ASSERT_EQ(sched_setaffinity(0, sizeof first, &first), 0);
    std::unique_ptr<Engine> engine;
    {
        const BundleCopy copy(GetParam());
        engine = backend->open({copy.folder / stage.onnx}, stage, of_threads(0));
    }
    EXPECT_EQ(sched_setaffinity(0, sizeof all, &all), 0);
    run(*engine, {0}, 1);
    run(*engine, {0, 1, 2}, 2);
}

// They are packed when a graph is compiled, and would stay in memory a second time.
TEST_P(Rows, MappedWeightsAreGivenBack) {
    if (GetParam() == std::string(WAVE)) return;  // which is compiled when it runs
    const BundleCopy copy(GetParam());
    const auto engine = backend->open({copy.folder / stage.onnx}, stage, of_threads(2));
    std::ifstream maps("/proc/self/smaps");
    const std::string file = (std::filesystem::canonical(copy.folder) / (stage.onnx + ".data")).string();
    std::vector<int> resident;
    bool mine = false;
    for (std::string line; std::getline(maps, line);) {
        if (line.find(" r--s ") != std::string::npos) mine = line.find(file) != std::string::npos;
        if (mine && line.rfind("Rss:", 0) == 0) resident.push_back(std::stoi(line.substr(4))), mine = false;
    }
    EXPECT_FALSE(resident.empty());
    for (const int kilobytes : resident) EXPECT_EQ(kilobytes, 0);
}
#endif

}  // namespace
}  // namespace dit_runtime
