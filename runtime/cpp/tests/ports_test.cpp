// Conditions by port through the C ABI: states of other ranks, several conditions, and none.
#include <cmath>
#include <functional>

#include "api.hpp"
#include "dit/dit.hpp"

namespace {

class Wave : public Api {
  protected:
    Wave() : Api(WAVE) {}

    void SetUp() override {
        Api::SetUp();
        for (std::size_t i = 0; i < std::size(words); ++i) words[i] = std::sin(7.0f * static_cast<float>(i));
        for (std::size_t i = 0; i < std::size(pooled); ++i) pooled[i] = std::cos(5.0f * static_cast<float>(i));
        arrays[0].name = "words", arrays[0].floats = words, arrays[0].size = 2 * 2 * 4, arrays[0].rows = 2;
        arrays[1].name = "pooled", arrays[1].floats = pooled, arrays[1].size = 2 * 5, arrays[1].rows = 2;
        request.labels = nullptr;
        request.count = 0;
        request.arrays = arrays;
        request.num_arrays = 2;
    }

    std::vector<float> draw(std::size_t rows = 2) {
        std::vector<float> state(rows * 6);
        EXPECT_EQ(dit_generate_latents(pipe.get(), &request, state.data(), state.size()), DIT_OK)
            << dit_message(pipe.get());
        return state;
    }

    void bad(const char* sentence, const std::function<void()>& change) {
        const dit_request before = request;
        const dit_array first = arrays[0], second = arrays[1];
        change();
        EXPECT_EQ(dit_generate_latents(pipe.get(), &request, numbers, std::size(numbers)), DIT_BAD_ARGUMENT);
        EXPECT_NE(std::string(dit_message(pipe.get())).find(sentence), std::string::npos) << dit_message(pipe.get());
        request = before, arrays[0] = first, arrays[1] = second;
        draw();
    }

    float words[2 * 3 * 4] = {}, pooled[2 * 5] = {};
    dit_array arrays[3] = {DIT_ARRAY_INIT, DIT_ARRAY_INIT, DIT_ARRAY_INIT};
};

INSTANTIATE_TEST_SUITE_P(Engines, Wave, ::testing::Values("onnxruntime", "openvino"));

TEST_P(Wave, InfoPortsAndVerify) {
    dit_info info = DIT_INFO_INIT;
    ASSERT_EQ(dit_get_info(pipe.get(), &info), DIT_OK);
    EXPECT_EQ(info.state_rank, 1);
    EXPECT_EQ(info.state_shape[0], 6);
    EXPECT_EQ(info.latent_shape[0] + info.image_shape[0] + info.num_classes, 0);
    ASSERT_EQ(dit_port_count(pipe.get()), 3u);
    dit_port port = DIT_PORT_INIT;
    ASSERT_EQ(dit_get_port(pipe.get(), 1, &port), DIT_OK);
    EXPECT_STREQ(port.name, "words_mask");
    EXPECT_STREQ(port.masks, "words");
    EXPECT_EQ(port.dtype, DIT_FLOAT32);
    EXPECT_EQ(port.rank, 1);
    EXPECT_EQ(port.shape[0], 3);
    EXPECT_FALSE(port.has_null);
    ASSERT_EQ(dit_get_port(pipe.get(), 2, &port), DIT_OK);
    EXPECT_TRUE(port.has_null);
    EXPECT_EQ(dit_get_port(pipe.get(), 3, &port), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_get_port(pipe.get(), 0, nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_port_count(nullptr), 0u);
    EXPECT_EQ(dit_verify(pipe.get(), nullptr, nullptr), DIT_OK) << dit_message(pipe.get());
}

// The reference is of other constants than the manifest has, so a guided run is another one.
TEST_P(Wave, ConstantsOfTheManifestAreVerified) {
    const BundleCopy copy(WAVE);
    copy.edit([](nlohmann::json& table) { table["null"]["pooled"] = 3; });
    const Handle fresh(dit_new());
    ASSERT_EQ(dit_open(fresh.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(fresh.get());
    EXPECT_EQ(dit_verify(fresh.get(), nullptr, nullptr), DIT_NOT_VERIFIED);
    EXPECT_NE(std::string(dit_message(fresh.get())).find("run: latents"), std::string::npos)
        << dit_message(fresh.get());
}

TEST_P(Wave, EachConditionIsRead) {
    const std::vector<float> first = draw();
    EXPECT_EQ(draw(), first);
    words[0] += 1;
    const std::vector<float> second = draw();
    EXPECT_NE(second, first);
    pooled[9] += 1;
    EXPECT_NE(draw(), second);
    const std::vector<float> constants = draw();
    dit_array negative = arrays[0];  // the other port's null is the bundle's
    negative.rows = 1, negative.size = 4;
    request.negative_arrays = &negative;
    request.num_negative_arrays = 1;
    EXPECT_NE(draw(), constants);
    const float alone = 1;
    request.guidance = &alone;
    request.num_guidance = 1;
    const std::vector<float> unguided = draw();
    request.negative_arrays = nullptr;
    request.num_negative_arrays = 0;
    EXPECT_EQ(draw(), unguided);
}

TEST_P(Wave, LowMemoryDrawsTheSame) {
    const std::vector<float> expected = draw();
    options.low_memory = 1;
    pipe.reset(dit_new());
    ASSERT_EQ(dit_open(pipe.get(), WAVE, &options), DIT_OK) << dit_message(pipe.get());
    const std::vector<float> again = draw();
    for (std::size_t i = 0; i < again.size(); ++i) EXPECT_NEAR(again[i], expected[i], 1e-5);
}

TEST_P(Wave, Refusals) {
    float marks[4] = {1, 0, 0, 0};
    bad("condition lacks pooled", [&] { request.num_arrays = 1; });
    bad("arrays is NULL", [&] { request.arrays = nullptr; });
    bad("dit_array.name is NULL", [&] { arrays[1].name = nullptr; });
    bad("arrays: words is there twice", [&] { arrays[1] = arrays[0]; });
    bad("unknown port 'signal'", [&] { arrays[1].name = "signal"; });
    bad("unknown port 'wrods' (did you mean \"words\"?)", [&] { arrays[0].name = "wrods"; });
    bad("pooled: expected either floats or integers", [&] { arrays[1].floats = nullptr; });
    bad("pooled has 0 numbers in 2 rows", [&] { arrays[1].size = 0; });
    bad("pooled has 9 numbers in 2 rows", [&] { arrays[1].size = 9; });
    bad("pooled has 10 numbers in 0 rows", [&] { arrays[1].rows = 0; });
    bad("pooled has shape [2, 4]; expected [rows, 5]", [&] { arrays[1].size = 8; });
    bad("words has 6 numbers a row; expected [3, 4]", [&] { arrays[0].size = 12; });
    bad("numbers of rows differ", [&] { arrays[1].rows = 1, arrays[1].size = 5; });
    bad("count is 3, of rows of arrays 2", [&] { request.count = 3; });
    bad("this bundle takes words, words_mask, pooled, and no labels",
        [&] { request.labels = labels, request.count = 2; });
    bad("struct_size is 7", [&] { arrays[0].struct_size = 7; });
    bad("needs a newer libdit", [&] { arrays[0].struct_size = 64 + sizeof(dit_array); });
    bad("words_mask has shape [2, 2]; expected [2, 2] of 0 and 1, a 1 in every row", [&] {
        arrays[2].name = "words_mask", arrays[2].floats = marks, arrays[2].size = 4, arrays[2].rows = 2;
        request.num_arrays = 3;
    });
    words[3] = NAN;
    EXPECT_EQ(dit_generate_latents(pipe.get(), &request, numbers, std::size(numbers)), DIT_BAD_ARGUMENT);
    EXPECT_NE(std::string(dit_message(pipe.get())).find("words holds values that are not finite"), std::string::npos);
}

TEST(Face, ConditionsByPort) {
    dit::Pipeline video(VIDEO), wave(WAVE);
    EXPECT_EQ(video.ports().size(), 2u);
    EXPECT_EQ(video.ports()[0].size, 4);
    EXPECT_EQ(wave.ports()[0].shape, (std::vector<std::int64_t>{3, 4}));
    dit::Request request;
    request.steps = 2;
    request.labels = {0, 2};
    request.condition["rate"] = {2, {0.5f, 2.0f}, {}};
    const std::vector<float> first = video.generate_latents(request);
    EXPECT_EQ(first.size(), 2u * 2 * 3 * 4 * 4);
    request.labels.clear();
    request.condition["labels"] = {2, {}, {0, 2}};
    EXPECT_EQ(video.generate_latents(request), first);
    request.condition["rate"] = {2, {}, {1, 2}};  // integers fit a port of floats
    EXPECT_NE(video.generate_latents(request), first);
    request.latents.assign(95, 0.0f);
    EXPECT_THROW(video.generate_latents(request), dit::Error);
    request.latents.clear();
    request.negative_condition["labels"] = {1, {}, {1}};
    EXPECT_NE(video.generate_latents(request), first);
    EXPECT_TRUE(video.verify());
    const dit::Images frames = video.generate(request);
    EXPECT_EQ(video.info().frames, 6);
    EXPECT_EQ(wave.info().frames, 0);
    EXPECT_EQ(video.info().image_shape[0] + video.info().image_shape[1] + video.info().image_shape[2], 32 + 32 + 3);
    EXPECT_EQ(frames.frames, 6u);
    EXPECT_EQ(frames.pixels.size(), 2u * 6 * 32 * 32 * 3);
    dit_size size = DIT_SIZE_INIT;
    ASSERT_EQ(dit_model_size(video.get(), 0, &size), DIT_OK);
    EXPECT_EQ(size.frames, 6);
    EXPECT_THROW(wave.generate_latents(request), dit::Error);
}

// Nothing conditions the network: the seeds say how many pictures there are.
TEST(Face, NoConditionAtAll) {
    dit::Pipeline pipe(FREE);
    EXPECT_TRUE(pipe.ports().empty());
    dit::Request request;
    request.steps = 2;
    request.seeds = {3, 4};
    const std::vector<float> both = pipe.generate_latents(request);
    EXPECT_EQ(both.size(), 2 * NUMBERS);
    EXPECT_EQ(pipe.generate(request).pixels.size(), 2 * PIXELS);
    request.seeds = {4};
    EXPECT_EQ(pipe.generate_latents(request), std::vector<float>(both.begin() + NUMBERS, both.end()));
    request.seeds = {0};
    request.latents.assign(3 * NUMBERS, 0.5f);
    EXPECT_EQ(pipe.generate_latents(request).size(), 3 * NUMBERS);  // so do latents to start from
    request.latents.clear();
    dit_request none = DIT_REQUEST_INIT;
    float number = 0;
    EXPECT_EQ(dit_model_generate_latents(pipe.get(), &none, &number, 0), DIT_BAD_ARGUMENT);
    EXPECT_NE(std::string(dit_last_message()).find("count is 0"), std::string::npos) << dit_last_message();
    EXPECT_TRUE(pipe.verify());
    EXPECT_EQ(pipe.info().num_classes, 0);
    EXPECT_THROW(pipe.find_label("ant"), dit::Error);
    request.labels = {1};
    EXPECT_THROW(pipe.generate_latents(request), dit::Error);
}

}  // namespace
