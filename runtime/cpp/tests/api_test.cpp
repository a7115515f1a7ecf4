// The C ABI on a whole bundle: what it draws, what it refuses, and that it works on afterwards.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <thread>

#include "bundle.hpp"
#include "dit/dit.h"
#include "dit/dit.hpp"
#include "sha256.hpp"

namespace {

constexpr std::size_t PIXELS = 32 * 32 * 3, NUMBERS = 2 * 4 * 4;

struct Free {
    void operator()(dit_pipeline* pipe) const { dit_free(pipe); }
};
using Handle = std::unique_ptr<dit_pipeline, Free>;

// Both engines, as far as this library has them.
class Api : public ::testing::TestWithParam<const char*> {
  protected:
    void SetUp() override {
        if (std::string(dit_backends()).find(GetParam()) == std::string::npos)
            GTEST_SKIP() << GetParam() << " was not found when the library was built";
        options.backend = GetParam();
        options.threads = 1;
        pipe.reset(dit_new());
        ASSERT_EQ(dit_open(pipe.get(), BUNDLE, &options), DIT_OK) << dit_message(pipe.get());
        request.labels = labels;
        request.count = 2;
        request.steps = 4;
    }

    std::vector<float> latents() {
        std::vector<float> numbers(request.count * NUMBERS);
        EXPECT_EQ(dit_generate_latents(pipe.get(), &request, numbers.data(), numbers.size()), DIT_OK)
            << dit_message(pipe.get());
        return numbers;
    }

    // The call fails in this way, with a sentence that holds the words; and the pipeline works afterwards.
    void refused(dit_status found, dit_status expected, const std::string& words) {
        EXPECT_STREQ(dit_status_name(found), dit_status_name(expected)) << dit_message(pipe.get());
        EXPECT_NE(std::string(dit_message(pipe.get())).find(words), std::string::npos) << dit_message(pipe.get());
        const dit_request kept = request;
        request = DIT_REQUEST_INIT;
        request.labels = labels;
        request.count = 1;
        request.steps = 2;
        latents();
        EXPECT_STREQ(dit_message(pipe.get()), "");
        request = kept;
    }

    dit_status generate() { return dit_generate_latents(pipe.get(), &request, numbers, std::size(numbers)); }

    dit_open_options options = DIT_OPEN_OPTIONS_INIT;
    dit_request request = DIT_REQUEST_INIT;
    Handle pipe;
    int64_t labels[8] = {1, 3, 0, 2, 4, 1, 1, 0};
    float numbers[8 * NUMBERS] = {};
    uint8_t pixels[2 * PIXELS] = {};
};

INSTANTIATE_TEST_SUITE_P(Engines, Api, ::testing::Values("onnxruntime", "openvino"));

TEST_P(Api, Info) {
    dit_info info = DIT_INFO_INIT;
    ASSERT_EQ(dit_get_info(pipe.get(), &info), DIT_OK);
    EXPECT_EQ(info.num_classes, 5);
    EXPECT_EQ(info.image_shape[0], 32);
    EXPECT_EQ(info.image_shape[2], 3);
    EXPECT_EQ(info.latent_shape[0], 2);
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

TEST_P(Api, Verify) {
    struct Seen {
        int checks = 0, failed = 0;
    } seen;
    const auto on_check = [](const char*, double, double, int passed, const char*, void* user) {
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
                ASSERT_NEAR(alone[i], together[index * NUMBERS + i], 1e-4) << solver << index;  // of values up to 10
        }
    }
}

TEST_P(Api, LowMemoryDrawsTheSame) {
    const std::vector<float> expected = latents();
    options.low_memory = 1;
    pipe.reset(dit_new());
    ASSERT_EQ(dit_open(pipe.get(), BUNDLE, &options), DIT_OK) << dit_message(pipe.get());
    const std::vector<float> found = latents();
    for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], 1e-5);
    EXPECT_EQ(dit_generate(pipe.get(), &request, pixels, sizeof pixels), DIT_OK) << dit_message(pipe.get());
}

TEST_P(Api, OwnLatents) {
    std::vector<float> own(2 * NUMBERS, 0.5f);
    request.latents = own.data();
    const std::vector<float> first = latents();
    const uint64_t seed = 9;
    request.seeds = &seed;
    request.num_seeds = 1;
    EXPECT_EQ(latents(), first);  // the seed draws nothing here
    own[3] = NAN;
    refused(generate(), DIT_BAD_ARGUMENT, "finite");
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
        return dit_get_info(static_cast<dit_pipeline*>(user), &info) == DIT_BUSY ? 0 : 1;
    };
    EXPECT_EQ(generate(), DIT_OK) << dit_message(pipe.get());
}

TEST_P(Api, BadRequests) {
    const auto bad = [this](const char* words, const std::function<void()>& change) {
        const dit_request kept = request;
        change();
        refused(generate(), DIT_BAD_ARGUMENT, words);
        request = kept;
    };
    int64_t wrong[2] = {1, 5};
    const uint64_t seeds[3] = {1, 2, 3};
    float guidance[3] = {1, 2, INFINITY};
    request.seeds = seeds;
    request.guidance = guidance;
    request.num_seeds = request.num_guidance = 1;
    bad("label 5 is out of range; expected 0 to 4", [&] { request.labels = wrong; });
    bad("label -1", [&] { wrong[1] = -1, request.labels = wrong; });
    bad("no labels", [&] { request.count = 0; });
    bad("labels is NULL", [&] { request.labels = nullptr; });
    bad("3 seeds for 2 samples", [&] { request.num_seeds = 3; });
    bad("0 seeds", [&] { request.num_seeds = 0; });
    bad("seeds is NULL", [&] { request.seeds = nullptr; });
    bad("guidance has 3", [&] { request.num_guidance = 3; });
    bad("guidance is NULL", [&] { request.guidance = nullptr; });
    bad("finite", [&] { request.guidance = guidance + 2; });
    bad("steps is -1", [&] { request.steps = -1; });
    bad("steps is 1001", [&] { request.steps = 1001; });
    bad("solver 'eular' is not known", [&] { request.solver = "eular"; });
    bad("spacing 'leding' is not known (did you mean \"leading\"?)", [&] { request.spacing = "leding"; });
    bad("eta is 2", [&] { request.eta = 2; });
    bad("eta is 0.5 with solver dpm++", [&] { request.eta = 0.5, request.solver = "dpm++"; });
    bad("needs a newer libdit", [&] { request.struct_size = sizeof request + 8; });
    bad("struct_size is 0", [&] { request.struct_size = 0; });
    bad("struct_size is 9", [&] { request.struct_size = 9; });
    refused(dit_generate_latents(pipe.get(), nullptr, numbers, 1), DIT_BAD_ARGUMENT, "dit_request is NULL");
    refused(dit_generate_latents(pipe.get(), &request, nullptr, 1), DIT_BAD_ARGUMENT, "latents is NULL");
    refused(dit_generate(pipe.get(), &request, nullptr, 1), DIT_BAD_ARGUMENT, "pixels is NULL");
    refused(dit_generate(pipe.get(), &request, pixels, sizeof pixels - 1), DIT_BUFFER_TOO_SMALL, "expected 6144");
    refused(dit_generate_latents(pipe.get(), &request, numbers, 63), DIT_BUFFER_TOO_SMALL, "expected 64");
    request.count = SIZE_MAX;
    refused(generate(), DIT_BAD_ARGUMENT, "no memory holds that many");
    refused(dit_get_info(pipe.get(), nullptr), DIT_BAD_ARGUMENT, "dit_info is NULL");
    dit_info info = DIT_INFO_INIT;
    info.struct_size += 1;
    refused(dit_get_info(pipe.get(), &info), DIT_BAD_ARGUMENT, "newer libdit");
    refused(dit_find_label(pipe.get(), nullptr, wrong), DIT_BAD_ARGUMENT, "name is NULL");
    refused(dit_find_label(pipe.get(), "ant", nullptr), DIT_BAD_ARGUMENT, "label is NULL");
    refused(dit_open(pipe.get(), BUNDLE, nullptr), DIT_BAD_ARGUMENT, "has a bundle already");
}

TEST_P(Api, BadOptions) {
    const auto bad = [](const char* words, dit_open_options options) {
        const Handle fresh(dit_new());
        EXPECT_EQ(dit_open(fresh.get(), BUNDLE, &options), DIT_BAD_ARGUMENT);
        EXPECT_NE(std::string(dit_message(fresh.get())).find(words), std::string::npos) << dit_message(fresh.get());
        options = DIT_OPEN_OPTIONS_INIT;
        EXPECT_EQ(dit_open(fresh.get(), BUNDLE, &options), DIT_OK) << dit_message(fresh.get());  // a second try
    };
    bad("backend 'onyx' is not in this library", {sizeof options, "onyx", nullptr, 0, 0});
    bad("device 'nowhere'", {sizeof options, GetParam(), "nowhere", 0, 0});
    bad("threads is -1", {sizeof options, GetParam(), nullptr, -1, 0});
    bad("struct_size is 4", {4, nullptr, nullptr, 0, 0});
    bad("newer libdit", {sizeof options + 16, nullptr, nullptr, 0, 0});
}

// Each kind of damage on the whole way: a status and a sentence, nothing opened, and a sound bundle opens after it.
TEST_P(Api, BadBundles) {
    using Json = nlohmann::json;
    const auto seal = [](const BundleCopy& copy) {
        copy.edit([&](Json& table) {
            for (auto& entry : table["files"].items()) {
                const auto path = copy.folder / entry.key();
                entry.value() = {{"size", std::filesystem::file_size(path)}, {"sha256", dit_runtime::sha256(path)}};
            }
        });
    };
    const auto bad = [&](const char* words, const std::function<void(const BundleCopy&)>& damage) {
        const BundleCopy copy;
        damage(copy);
        const Handle fresh(dit_new());
        EXPECT_EQ(dit_open(fresh.get(), copy.folder.c_str(), &options), DIT_BAD_BUNDLE) << words;
        EXPECT_NE(std::string(dit_message(fresh.get())).find(words), std::string::npos) << dit_message(fresh.get());
        dit_info info = DIT_INFO_INIT;
        EXPECT_EQ(dit_get_info(fresh.get(), &info), DIT_BAD_ARGUMENT);
        EXPECT_EQ(dit_open(fresh.get(), BUNDLE, &options), DIT_OK) << dit_message(fresh.get());
    };
    bad("no manifest.json", [](const BundleCopy& copy) { std::filesystem::remove(copy.folder / "manifest.json"); });
    bad("not JSON", [](const BundleCopy& copy) { copy.write("manifest.json", "{"); });
    bad("sha256", [](const BundleCopy& copy) {
        std::string content = copy.bytes("decoder.onnx");
        content[content.size() - 1] ^= 1;
        copy.write("decoder.onnx", content);
    });
    bad("does not", [&](const BundleCopy& copy) {
        copy.write("denoiser.onnx", "not a graph\nat all");
        seal(copy);
    });
    bad("conditioner has inputs", [](const BundleCopy& copy) {
        copy.edit([](Json& table) { table["graphs"]["conditioner"]["onnx"] = "denoiser.onnx"; });
    });
    bad("leaves the bundle", [](const BundleCopy& copy) {
        copy.edit([](Json& table) {
            table["graphs"]["denoiser"]["onnx"] = "../d.onnx";
            for (const char* name : {"../d.onnx", "../d.onnx.data"})
                table["files"][name] = {{"size", 1}, {"sha256", ""}};
        });
    });
    const auto location = [](const BundleCopy& copy, const std::string& name) {
        // The graph names its weights by a path of the same length that leads out of the folder.
        std::filesystem::copy_file(copy.folder / "denoiser.onnx.data", copy.folder.parent_path() / name,
                                   std::filesystem::copy_options::overwrite_existing);
        std::string content = copy.bytes("denoiser.onnx");
        const std::string own = "denoiser.onnx.data", other = "../" + name;
        for (std::size_t at = 0; (at = content.find(own, at)) != std::string::npos;)
            content.replace(at, own.size(), other);
        copy.write("denoiser.onnx", content);
    };
    bad("denoiser.onnx", [&](const BundleCopy& copy) {
        location(copy, "dit-outside.dat");  // with "../", as long as denoiser.onnx.data
        seal(copy);
    });
    std::filesystem::remove(std::filesystem::temp_directory_path() / "dit-outside.dat");
}

// Engines and manifests that disagree in shapes are caught before a number is read.
TEST_P(Api, ShapesThatDisagree) {
    const BundleCopy copy;
    copy.edit([](nlohmann::json& table) { table["graphs"]["conditioner"]["outputs"][0]["shape"] = {"pairs", 2, 9}; });
    const Handle fresh(dit_new());
    ASSERT_EQ(dit_open(fresh.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(fresh.get());
    EXPECT_EQ(dit_generate_latents(fresh.get(), &request, numbers, std::size(numbers)), DIT_ENGINE_FAILED);
    EXPECT_NE(std::string(dit_message(fresh.get())).find("expected [3, 2, 9]"), std::string::npos)
        << dit_message(fresh.get());
}

// One weight that is wrong: every sum is right, so only verification can notice.
TEST_P(Api, AWrongWeightIsNotVerified) {
    const BundleCopy copy;
    std::string content = copy.bytes("conditioner.onnx.data");
    content[4 * 16 * 2 + 3] ^= 0x40;  // of label 2, which the reference's run does not use
    copy.write("conditioner.onnx.data", content);
    copy.edit([&](nlohmann::json& table) {
        table["files"]["conditioner.onnx.data"]["sha256"] = dit_runtime::sha256(copy.folder / "conditioner.onnx.data");
    });
    const Handle fresh(dit_new());
    ASSERT_EQ(dit_open(fresh.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(fresh.get());
    EXPECT_EQ(dit_verify(fresh.get(), nullptr, nullptr), DIT_NOT_VERIFIED);
    EXPECT_NE(std::string(dit_message(fresh.get())).find("label 2"), std::string::npos) << dit_message(fresh.get());
}

TEST(Nothing, NullsAndEmptyHandles) {
    dit_free(nullptr);
    int64_t label = 0;
    float number = 0;
    const dit_request request = DIT_REQUEST_INIT;
    EXPECT_EQ(dit_open(nullptr, BUNDLE, nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_find_label(nullptr, "ant", &label), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_verify(nullptr, nullptr, nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_label(nullptr, 0), nullptr);
    EXPECT_STRNE(dit_message(nullptr), "");
    const Handle empty(dit_new());
    EXPECT_EQ(dit_generate_latents(empty.get(), &request, &number, 1), DIT_BAD_ARGUMENT);
    EXPECT_NE(std::string(dit_message(empty.get())).find("call dit_open first"), std::string::npos);
    EXPECT_EQ(dit_open(empty.get(), nullptr, nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_open(empty.get(), "/nowhere", nullptr), DIT_BAD_BUNDLE);
    EXPECT_EQ(dit_label(empty.get(), 0), nullptr);
    EXPECT_STREQ(dit_status_name(static_cast<dit_status>(99)), "unknown status");
    EXPECT_EQ(std::string(dit_version()).find("0."), 0u);
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
