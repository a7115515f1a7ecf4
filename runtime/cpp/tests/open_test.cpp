// How bundles are opened through the C ABI: whose manifest, signed by which key, on which device, warmed.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <utility>

#include "api.hpp"
#include "dit/dit.hpp"
#include "sha256.hpp"

namespace {

TEST_P(Api, TheManifestThatWasAskedFor) {
    std::string sum = dit_runtime::sha256(std::filesystem::path(BUNDLE) / "manifest.json");
    const auto open = [&] {
        pipe.reset(dit_new());
        options.manifest_sha256 = sum.c_str();
        return dit_open(pipe.get(), BUNDLE, &options);
    };
    EXPECT_EQ(open(), DIT_OK) << dit_message(pipe.get());
    std::transform(sum.begin(), sum.end(), sum.begin(), [](unsigned char digit) { return std::toupper(digit); });
    EXPECT_EQ(open(), DIT_OK) << dit_message(pipe.get());
    sum[5] = sum[5] == '0' ? '1' : '0';
    EXPECT_EQ(open(), DIT_BAD_BUNDLE);
    EXPECT_NE(std::string(dit_last_message()).find("this is another bundle"), std::string::npos) << dit_last_message();
    for (const char* wrong : {"", "1234"}) {
        sum = wrong;
        EXPECT_EQ(open(), *wrong ? DIT_BAD_ARGUMENT : DIT_OK) << wrong;
    }
}

TEST_P(Api, TheKeyThatMustHaveSigned) {
    const std::vector<std::uint8_t> key(32, 1);
    const auto open = [&](const std::uint8_t* bytes, std::size_t size) {
        pipe.reset(dit_new());
        options.public_key = bytes;
        options.public_key_size = size;
        return dit_open(pipe.get(), BUNDLE, &options);
    };
    const auto refuses = [&](const std::uint8_t* bytes, std::size_t size, dit_status status, const char* words) {
        EXPECT_STREQ(dit_status_name(open(bytes, size)), dit_status_name(status));
        EXPECT_NE(std::string(dit_last_message()).find(words), std::string::npos) << dit_last_message();
    };
    refuses(key.data(), 32, DIT_BAD_BUNDLE, "not signed");
    refuses(key.data(), 31, DIT_BAD_ARGUMENT, "public_key has 31 bytes; expected 32");
    refuses(key.data(), 0, DIT_BAD_ARGUMENT, "public_key has 0 bytes; expected 32");
    refuses(nullptr, 32, DIT_BAD_ARGUMENT, "public_key is NULL");
    EXPECT_EQ(open(nullptr, 0), DIT_OK) << dit_message(pipe.get());
    dit::OpenOptions face;
    EXPECT_NO_THROW(dit::Pipeline(BUNDLE, face));
    for (const std::size_t size : {0u, 32u}) {  // an empty key is none that signed
        face.public_key.emplace(size, std::uint8_t{1});
        EXPECT_THROW(dit::Pipeline(BUNDLE, face), dit::Error);
    }
}

TEST(Face, TheFolderMayBeLeft) {
    const std::filesystem::path here = std::filesystem::current_path(), bundle = BUNDLE;
    std::filesystem::current_path(bundle.parent_path());
    dit::OpenOptions options;
    options.low_memory = true;  // engines are opened when a run comes to them
    dit::Pipeline pipe(bundle.filename().string(), options);
    std::filesystem::current_path("/");
    dit::Request request;
    request.labels = {1};
    request.steps = 2;
    EXPECT_EQ(pipe.generate(request).pixels.size(), PIXELS);
    std::filesystem::current_path(here);
}

// These engines compile nothing that is kept.
TEST_P(Api, NoCacheIsMade) {
    const char* const before = std::getenv("XDG_CACHE_HOME");
    const std::string restored = before ? before : "";
    const BundleCopy copy;
    const std::filesystem::path cache = copy.folder / "cache";
    setenv("XDG_CACHE_HOME", cache.c_str(), 1);
    pipe.reset(dit_new());
    EXPECT_EQ(dit_open(pipe.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(pipe.get());
    EXPECT_EQ(generate(), DIT_OK) << dit_message(pipe.get());
    EXPECT_FALSE(std::filesystem::exists(cache));
    before ? setenv("XDG_CACHE_HOME", restored.c_str(), 1) : unsetenv("XDG_CACHE_HOME");
}

// A device that only OpenVINO has: in low memory too, no stage is moved to another backend.
TEST(Face, ADeviceIsOfItsBackend) {
    if (std::string(dit_backends()).find("openvino") == std::string::npos)
        GTEST_SKIP() << "no OpenVINO in this library";
    const BundleCopy copy;
    copy.edit([](nlohmann::json& table) {
        for (auto& stage : table["stages"]) stage["backend"] = "openvino";
    });
    dit::OpenOptions options;
    options.low_memory = true;
    options.device = "AUTO";
    dit::Pipeline pipe(copy.folder.string(), options);
    dit::Request request;
    request.labels = {1};
    request.steps = 2;
    EXPECT_EQ(pipe.generate(request).pixels.size(), PIXELS);
}

// To open or to compile a graph takes its file, and the bundle is gone.
TEST_P(Api, AfterWarmingRequestsNeedNoFile) {
    const int64_t batches[] = {1, 3};
    pipe.reset(dit_new());
    options.threads = 2;
    options.warm = batches;
    options.num_warm = std::size(batches);
    {
        const BundleCopy copy;
        ASSERT_EQ(dit_open(pipe.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(pipe.get());
    }
    for (const auto& [count, strength] : {std::pair(1, 1.0f), std::pair(3, 4.0f), std::pair(1, 4.0f)}) {
        request.count = static_cast<std::size_t>(count);
        request.guidance = &strength;
        request.num_guidance = 1;
        std::vector<uint8_t> images(request.count * PIXELS);
        EXPECT_EQ(dit_generate(pipe.get(), &request, images.data(), images.size()), DIT_OK) << dit_message(pipe.get());
    }
}

// Nobody made the conditions of warming: what a network gives for them is no reason to refuse a bundle.
TEST_P(Api, WarmingTakesAnyValues) {
    const int64_t batches[] = {1, 3};
    options.warm = batches;
    options.num_warm = std::size(batches);
    const auto spoiled = [this](const char* file, std::size_t first, std::size_t size) {
        const BundleCopy copy;
        std::string content = copy.bytes(file);
        content.replace(first, size ? size : content.size(), size ? size : content.size(), '\xff');  // NaN
        copy.write(file, content);
        copy.edit(
            [&](nlohmann::json& table) { table["files"][file]["sha256"] = dit_runtime::sha256(copy.folder / file); });
        pipe.reset(dit_new());
        EXPECT_EQ(dit_open(pipe.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(pipe.get());
        EXPECT_EQ(dit_generate(pipe.get(), &request, pixels, sizeof pixels), DIT_ENGINE_FAILED);
        EXPECT_NE(std::string(dit_message(pipe.get())).find("not finite"), std::string::npos)
            << dit_message(pipe.get());
    };
    spoiled("denoiser.onnx.data", 0, 0);
    const std::string weights = "colours\x4a\x18";  // the decoder's, 24 bytes in its graph
    const std::size_t place = BundleCopy().bytes("decoder.onnx").find(weights);
    ASSERT_NE(place, std::string::npos);
    spoiled("decoder.onnx", place + weights.size(), 24);
}

// An engine that fails has failed: this one takes 3 rows, and its manifest says 8.
TEST_P(Api, WarmingThatFailsRefusesTheBundle) {
    if (GetParam() != std::string("onnxruntime")) return;  // the other takes more
    const BundleCopy copy;
    copy.edit([](nlohmann::json& table) {
        for (auto& entry : table["stages"]) entry["max_batch"] = 8;
    });
    const int64_t batch = 8;
    options.warm = &batch;
    options.num_warm = 1;
    pipe.reset(dit_new());
    EXPECT_EQ(dit_open(pipe.get(), copy.folder.c_str(), &options), DIT_ENGINE_FAILED) << dit_message(pipe.get());
}

}  // namespace
