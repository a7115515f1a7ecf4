// The C ABI and its C++ face on a whole bundle: what they draw.
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <future>
#include <iterator>
#include <thread>
#include <utility>

#include "api.hpp"
#include "dit/dit.hpp"
#include "sha256.hpp"

namespace {

#ifdef __SANITIZE_ADDRESS__
// OpenVINO's plugins stay loaded to the end: a leak report can then name the library that it is about.
[[maybe_unused]] dit_pipeline* const loaded = [] {
    dit_open_options options = DIT_OPEN_OPTIONS_INIT;
    options.backend = "openvino";
    dit_pipeline* const pipe = dit_new();
    dit_open(pipe, BUNDLE, &options);
    return pipe;
}();
#endif

INSTANTIATE_TEST_SUITE_P(Engines, Api, ::testing::Values("onnxruntime", "openvino"));

TEST_P(Api, Info) {
    dit_info info = DIT_INFO_INIT;
    ASSERT_EQ(dit_get_info(pipe.get(), &info), DIT_OK);
    EXPECT_EQ(info.num_classes, 5);
    EXPECT_EQ(info.image_shape[0], 32);
    EXPECT_EQ(info.image_shape[2], 3);
    EXPECT_EQ(info.latent_shape[0], 2);
    EXPECT_EQ(info.state_rank, 3);
    EXPECT_EQ(info.state_shape[2], 4);
    EXPECT_EQ(info.state_shape[3], 0);
    EXPECT_EQ(info.batch_invariant, 0);  // this bundle's maker does not say
    EXPECT_STREQ(info.backend, GetParam());
    EXPECT_STREQ(info.solver, "ddim");
    EXPECT_STREQ(dit_label(pipe.get(), 4), "elk");
    for (const int64_t label : {int64_t{-1}, int64_t{5}, INT64_MAX, INT64_MIN})
        EXPECT_EQ(dit_label(pipe.get(), label), nullptr);
    int64_t label = -1;
    EXPECT_EQ(dit_find_label(pipe.get(), " Hound", &label), DIT_OK);
    EXPECT_EQ(label, 3);
    EXPECT_EQ(dit_find_label(pipe.get(), "2", &label), DIT_OK);
    EXPECT_EQ(label, 2);
    refused(dit_find_label(pipe.get(), "hounds", &label), DIT_BAD_ARGUMENT, "did you mean \"hound\"");
    for (const char* name : {"5", "-1", "999999999999999999999", "", "-"})
        EXPECT_EQ(dit_find_label(pipe.get(), name, &label), DIT_BAD_ARGUMENT) << name;
}

// The build measured its own backend's kernels on the CPU; others are not known.
TEST_P(Api, BatchInvarianceIsOfTheBuildsOwnEngines) {
    const auto invariant = [this](const char* backend, const char* device, const char* stages) {
        const BundleCopy copy;
        copy.edit([&](nlohmann::json& table) {
            table["batch_invariant"] = true;
            for (const char* name : {"denoiser", "decoder"})
                if (stages == std::string("all") || stages == std::string(name))
                    stage(table, name)["backend"] = GetParam();
        });
        options.backend = backend;
        options.device = device;
        pipe.reset(dit_new());
        EXPECT_EQ(dit_open(pipe.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(pipe.get());
        dit_info info = DIT_INFO_INIT;
        EXPECT_EQ(dit_get_info(pipe.get(), &info), DIT_OK);
        return info.batch_invariant;
    };
    const bool openvino = GetParam() == std::string("openvino");
    EXPECT_EQ(invariant(nullptr, nullptr, "all"), 1);
    EXPECT_EQ(invariant("auto", "CPU", "all"), 1);
    if (openvino) {
        EXPECT_EQ(invariant("openvino", "AUTO", "all"), 0);
        EXPECT_EQ(invariant("openvino", nullptr, "denoiser"), 0);  // the decoder was built for onnxruntime
        EXPECT_EQ(invariant("openvino", nullptr, "decoder"), 0);
        EXPECT_EQ(invariant("openvino", nullptr, "all"), 1);  // in the stages before the loop, rows are as alone
    }
}

TEST_P(Api, Verify) {
    struct Seen {
        int checks = 0, failed = 0;
    } seen;
    const auto on_check = [](const char*, double, double, int, int passed, const char*, void* user) {
        static_cast<Seen*>(user)->checks++;
        static_cast<Seen*>(user)->failed += !passed;
    };
    EXPECT_EQ(dit_verify(pipe.get(), on_check, &seen), DIT_OK) << dit_message(pipe.get());
    EXPECT_GT(seen.checks, 20);
    EXPECT_EQ(seen.failed, 0);
    EXPECT_EQ(dit_verify(pipe.get(), nullptr, nullptr), DIT_OK);
}

TEST_P(Api, APictureIsWhatItsLatentsSay) {
    ASSERT_EQ(dit_generate(pipe.get(), &request, pixels, sizeof pixels), DIT_OK) << dit_message(pipe.get());
    const std::vector<uint8_t> first(pixels, pixels + 2 * PIXELS);
    EXPECT_NE(std::vector<uint8_t>(first.begin(), first.begin() + PIXELS),
              std::vector<uint8_t>(first.begin() + PIXELS, first.end()));
    ASSERT_EQ(dit_generate(pipe.get(), &request, pixels, sizeof pixels), DIT_OK);
    EXPECT_EQ(std::vector<uint8_t>(pixels, pixels + 2 * PIXELS), first);  // one seed, one picture
    const uint64_t other = 1;
    request.seeds = &other;
    request.num_seeds = 1;
    ASSERT_EQ(dit_generate(pipe.get(), &request, pixels, sizeof pixels), DIT_OK);
    EXPECT_NE(std::vector<uint8_t>(pixels, pixels + 2 * PIXELS), first);
}

// More labels than a batch, each with its seed and guidance: a sample does not depend on its neighbours.
TEST_P(Api, ASampleWithItsOwnSeedStandsAlone) {
    const uint64_t seeds[8] = {1, 2, 3, 4, 5, 6, 7, UINT64_MAX};
    const float guidance[8] = {4, 1, 2, 3, 1.5f, 0, -1, 7};
    for (const char* solver : {"ddim", "ddpm", "dpm++"}) {
        request.solver = solver;
        request.labels = labels;
        request.count = request.num_seeds = request.num_guidance = 8;
        request.seeds = seeds;
        request.guidance = guidance;
        const std::vector<float> together = latents();
        for (std::size_t index = 0; index < 8; ++index) {
            request.labels = labels + index;
            request.seeds = seeds + index;
            request.guidance = guidance + index;
            request.count = request.num_seeds = request.num_guidance = 1;
            const std::vector<float> alone = latents();
            for (std::size_t i = 0; i < NUMBERS; ++i)
                ASSERT_NEAR(alone[i], together[index * NUMBERS + i], 1e-3) << solver << index;  // of values up to 150
        }
    }
}

TEST_P(Api, LowMemoryDrawsTheSame) {
    const std::vector<float> expected = latents();
    options.low_memory = 1;
    pipe.reset(dit_new());
    ASSERT_EQ(dit_open(pipe.get(), BUNDLE, &options), DIT_OK) << dit_message(pipe.get());
    const std::vector<float> again = latents();
    for (std::size_t i = 0; i < again.size(); ++i) EXPECT_NEAR(again[i], expected[i], 1e-5);
    EXPECT_EQ(dit_generate(pipe.get(), &request, pixels, sizeof pixels), DIT_OK) << dit_message(pipe.get());
}

TEST_P(Api, OwnLatents) {
    std::vector<float> own(2 * NUMBERS, 0.5f);
    request.latents = own.data();
    refused(generate(), DIT_BAD_ARGUMENT, "latents have 0 numbers; expected 64");
    request.latents_size = own.size() - 1;
    refused(generate(), DIT_BAD_ARGUMENT, "latents have 63 numbers; expected 64");
    request.latents_size = own.size();
    const std::vector<float> first = latents();
    const uint64_t seed = 9;
    request.seeds = &seed;
    request.num_seeds = 1;
    EXPECT_EQ(latents(), first);  // the seed draws nothing here
    own[3] = NAN;
    refused(generate(), DIT_BAD_ARGUMENT, "finite");
    request.latents = nullptr;
    refused(generate(), DIT_BAD_ARGUMENT, "latents is NULL");
}

TEST_P(Api, ACallbackThatCancels) {
    struct Seen {
        int steps = 0;
        double last = 0;
    } seen;
    request.user = &seen;
    request.on_step = [](int step, int steps, const double* x, size_t size, void* user) {
        EXPECT_EQ(steps, 4);
        EXPECT_EQ(size, 2 * NUMBERS);
        static_cast<Seen*>(user)->steps = step;
        static_cast<Seen*>(user)->last = x[0];
        return 0;
    };
    const std::vector<float> whole = latents();
    EXPECT_EQ(seen.steps, 4);
    EXPECT_EQ(static_cast<float>(seen.last), whole[0]);
    request.on_step = [](int step, int, const double*, size_t, void* user) {
        static_cast<Seen*>(user)->steps = step;
        return step == 2 ? -1 : 0;
    };
    refused(generate(), DIT_STOPPED, "after step 2 of 4");
    EXPECT_EQ(seen.steps, 2);
}

TEST_P(Api, ACallbackThatCallsBack) {
    request.user = pipe.get();
    request.on_step = [](int, int, const double*, size_t, void* user) {
        dit_info info = DIT_INFO_INIT;
        return dit_get_info(static_cast<dit_pipeline*>(user), &info) == DIT_OK ? 0 : 1;
    };
    EXPECT_EQ(generate(), DIT_OK) << dit_message(pipe.get());
}

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

TEST(Face, ExceptionsOfTheCallerReachTheCaller) {
    dit::Pipeline pipe(BUNDLE);
    dit::Request request;
    request.labels = {1};
    request.steps = 2;
    request.on_step = [](int, int, const double*, std::size_t) -> bool { throw std::out_of_range("mine"); };
    EXPECT_THROW(pipe.generate(request), std::out_of_range);
    request.on_step = nullptr;
    EXPECT_EQ(pipe.generate(request).pixels.size(), PIXELS);
    request.labels.clear();
    EXPECT_THROW(pipe.generate(request), dit::Error);
    EXPECT_THROW(dit::Pipeline("/nowhere"), dit::Error);
    int checks = 0;
    EXPECT_THROW(pipe.verify([&](const dit::Check&) { throw std::out_of_range(std::to_string(++checks)); }),
                 std::out_of_range);
    EXPECT_EQ(checks, 1);
    EXPECT_TRUE(pipe.verify());
    EXPECT_EQ(pipe.label(0), "ant");
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
    const std::string kept = before ? before : "";
    const BundleCopy copy;
    const std::filesystem::path cache = copy.folder / "cache";
    setenv("XDG_CACHE_HOME", cache.c_str(), 1);
    pipe.reset(dit_new());
    EXPECT_EQ(dit_open(pipe.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(pipe.get());
    EXPECT_EQ(generate(), DIT_OK) << dit_message(pipe.get());
    EXPECT_FALSE(std::filesystem::exists(cache));
    before ? setenv("XDG_CACHE_HOME", kept.c_str(), 1) : unsetenv("XDG_CACHE_HOME");
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

// Two threads with a pipeline each give what one gives; ThreadSanitizer watches in `make test-all`.
TEST(Threads, APipelineEach) {
    const auto draw = [](std::vector<float>& result, std::int64_t label) {
        dit::OpenOptions options;
        options.threads = 1;
        dit::Pipeline pipe(BUNDLE, options);
        dit::Request request;
        request.labels = {label};
        request.steps = 4;
        request.solver = "ddpm";
        for (int round = 0; round < 5; ++round) result = pipe.generate_latents(request);
    };
    std::vector<float> alone[2], together[2];
    for (int index = 0; index < 2; ++index) draw(alone[index], index);
    std::thread first(draw, std::ref(together[0]), 0), second(draw, std::ref(together[1]), 1);
    first.join();
    second.join();
    EXPECT_EQ(alone[0], together[0]);
    EXPECT_EQ(alone[1], together[1]);
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
