// The C ABI and its C++ face on a whole bundle: what they draw.
#include <cmath>
#include <thread>

#include "api.hpp"
#include "dit/dit.hpp"

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
    struct Counts {
        int checks = 0, failed = 0;
    } counts;
    const auto on_check = [](const char*, double, double, int, int passed, const char*, void* user) {
        static_cast<Counts*>(user)->checks++;
        static_cast<Counts*>(user)->failed += !passed;
    };
    EXPECT_EQ(dit_verify(pipe.get(), on_check, &counts), DIT_OK) << dit_message(pipe.get());
    EXPECT_GT(counts.checks, 20);
    EXPECT_EQ(counts.failed, 0);
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
    struct Progress {
        int steps = 0;
        double last = 0;
    } progress;
    request.user = &progress;
    request.on_step = [](int step, int steps, const double* x, size_t size, void* user) {
        EXPECT_EQ(steps, 4);
        EXPECT_EQ(size, 2 * NUMBERS);
        static_cast<Progress*>(user)->steps = step;
        static_cast<Progress*>(user)->last = x[0];
        return 0;
    };
    const std::vector<float> whole = latents();
    EXPECT_EQ(progress.steps, 4);
    EXPECT_EQ(static_cast<float>(progress.last), whole[0]);
    request.on_step = [](int step, int, const double*, size_t, void* user) {
        static_cast<Progress*>(user)->steps = step;
        return step == 2 ? -1 : 0;
    };
    refused(generate(), DIT_STOPPED, "after step 2 of 4");
    EXPECT_EQ(progress.steps, 2);
}

TEST_P(Api, ACallbackThatCallsBack) {
    request.user = pipe.get();
    request.on_step = [](int, int, const double*, size_t, void* user) {
        dit_info info = DIT_INFO_INIT;
        return dit_get_info(static_cast<dit_pipeline*>(user), &info) == DIT_OK ? 0 : 1;
    };
    EXPECT_EQ(generate(), DIT_OK) << dit_message(pipe.get());
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

}  // namespace
