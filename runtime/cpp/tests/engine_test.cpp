// Refusals before an engine is opened. Mirrors the refusals in tests/tensorrt/test_engine.py.
#include "engine.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "bundle.hpp"
#include "errors.hpp"

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

}  // namespace
}  // namespace dit_runtime
