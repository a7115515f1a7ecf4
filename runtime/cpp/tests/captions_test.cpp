// A bundle that draws by captions, through the C ABI; and programs of the time before there were any.
#include <cmath>
#include <cstring>

#include "api.hpp"
#include "dit/dit.hpp"

namespace {

constexpr std::size_t TOKENS = 4, CHANNELS = 3;  // of these captions; the bundle takes up to 5 tokens

class Captioned : public Api {
  protected:
    Captioned() : Api(CAPTIONED) {}

    void SetUp() override {
        Api::SetUp();
        request.labels = nullptr;
        request.count = 0;
        for (std::size_t i = 0; i < std::size(embeddings); ++i) embeddings[i] = std::sin(7.0f * static_cast<float>(i));
        captions.count = 2;
        captions.tokens = TOKENS;
        captions.embeddings = embeddings;
        captions.size = std::size(embeddings);
        negative.count = 1;
        negative.tokens = 2;
        negative.embeddings = embeddings + 5;
        negative.size = 2 * CHANNELS;
    }

    void write() {
        request.captions = &captions;
        request.negative = &negative;
    }

    std::vector<float> latents() {
        std::vector<float> numbers(captions.count * NUMBERS);
        EXPECT_EQ(dit_generate_latents(pipe.get(), &request, numbers.data(), numbers.size()), DIT_OK)
            << dit_message(pipe.get());
        return numbers;
    }

    // The call fails in this way, and the pipeline works afterwards.
    void refused(const char* words) {
        EXPECT_EQ(dit_generate_latents(pipe.get(), &request, numbers, std::size(numbers)), DIT_BAD_ARGUMENT) << words;
        EXPECT_NE(std::string(dit_message(pipe.get())).find(words), std::string::npos) << dit_message(pipe.get());
    }

    float embeddings[2 * TOKENS * CHANNELS] = {};
    dit_captions captions = DIT_CAPTIONS_INIT, negative = DIT_CAPTIONS_INIT;
};

INSTANTIATE_TEST_SUITE_P(Engines, Captioned, ::testing::Values("onnxruntime", "openvino"));

double largest(const std::vector<float>& first, const std::vector<float>& second) {
    double gap = first.size() == second.size() ? 0 : INFINITY;
    for (std::size_t i = 0; i < std::min(first.size(), second.size()); ++i)
        gap = std::max(gap, static_cast<double>(std::abs(first[i] - second[i])));
    return gap;
}

TEST_P(Captioned, InfoAndVerify) {
    dit_info info = DIT_INFO_INIT;
    ASSERT_EQ(dit_get_info(pipe.get(), &info), DIT_OK);
    EXPECT_EQ(info.caption_shape[0], 5);
    EXPECT_EQ(info.caption_shape[1], 3);
    EXPECT_EQ(info.num_classes, 0);
    EXPECT_EQ(dit_verify(pipe.get(), nullptr, nullptr), DIT_OK) << dit_message(pipe.get());
}

TEST_P(Captioned, WhatTheCallerSays) {
    write();
    const std::vector<float> both = latents();
    const dit_array as_array = {sizeof(dit_array), "captions", 2, std::size(embeddings), embeddings, nullptr};
    const dit_array away = {sizeof(dit_array), "captions", 1, 2 * CHANNELS, negative.embeddings, nullptr};
    request = DIT_REQUEST_INIT;
    request.steps = 4;
    request.arrays = &as_array;
    request.negative_arrays = &away;
    request.num_arrays = request.num_negative_arrays = 1;
    EXPECT_EQ(latents(), both);  // captions are the port of that name
    request.arrays = request.negative_arrays = nullptr;
    request.num_arrays = request.num_negative_arrays = 0;
    write();
    ASSERT_EQ(dit_generate(pipe.get(), &request, pixels, sizeof pixels), DIT_OK) << dit_message(pipe.get());

    const uint64_t seeds[2] = {3, 4};
    request.seeds = seeds;
    request.num_seeds = 2;
    const std::vector<float> together = latents();
    captions.count = request.num_seeds = 1;
    captions.size /= 2;
    for (int index = 0; index < 2; ++index) {  // a sample does not depend on its batch
        captions.embeddings = embeddings + TOKENS * CHANNELS * static_cast<std::size_t>(index);
        request.seeds = seeds + index;
        const auto start = together.begin() + index * static_cast<int>(NUMBERS);
        EXPECT_LT(largest(latents(), {start, start + NUMBERS}), 1e-4);  // of values up to 10
    }
    request.negative = nullptr;
    const float alone = 1;
    request.guidance = &alone;
    request.num_guidance = 1;
    latents();
}

// Masked tokens change nothing; others do.
TEST_P(Captioned, Masks) {
    const float mask[2 * TOKENS] = {1, 1, 1, 0, 1, 1, 1, 0};
    write();
    const std::vector<float> whole = latents();
    captions.mask = mask;
    captions.mask_size = std::size(mask);
    const std::vector<float> hidden = latents();
    EXPECT_GT(largest(whole, hidden), 1e-2);
    embeddings[TOKENS * CHANNELS - 1] += 3;
    embeddings[2 * TOKENS * CHANNELS - 1] += 3;
    EXPECT_EQ(latents(), hidden);
    embeddings[0] += 3;
    EXPECT_GT(largest(latents(), hidden), 1e-2);
}

TEST_P(Captioned, LowMemoryDrawsTheSame) {
    write();
    const std::vector<float> expected = latents();
    options.low_memory = 1;
    pipe.reset(dit_new());
    ASSERT_EQ(dit_open(pipe.get(), CAPTIONED, &options), DIT_OK) << dit_message(pipe.get());
    EXPECT_LT(largest(latents(), expected), 1e-5);
}

TEST_P(Captioned, Refusals) {
    const auto bad = [this](const char* words, const std::function<void()>& change) {
        const dit_request before = request;
        const dit_captions own = captions, null = negative;
        write();
        change();
        refused(words);
        request = before, captions = own, negative = null;
        write();
        latents();
    };
    float mask[2 * TOKENS] = {1, 0, 0, 0};
    bad("condition lacks captions; expected an array for each of captions, mask", [&] { request.captions = nullptr; });
    bad("both labels and captions", [&] { request.labels = labels; });
    bad("count is 1, of captions 2", [&] { request.count = 1; });
    bad("this bundle takes captions, mask, and no labels",
        [&] { request.captions = nullptr, request.labels = labels, request.count = 1; });
    bad("guidance needs a negative with captions", [&] { request.negative = nullptr; });
    bad("negative has 3 rows; expected one, or one for each of 2 samples",
        [&] { negative.count = 3, negative.size *= 3; });
    bad("negative captions are 0 of 2 tokens", [&] { negative.count = 0; });
    bad("captions are 2 of 6 tokens", [&] { captions.tokens = 6; });
    bad("captions are 2 of 0 tokens", [&] { captions.tokens = 0; });
    bad("captions are 0 of 4 tokens", [&] { captions.count = 0; });
    bad("embeddings is NULL", [&] { captions.embeddings = nullptr; });
    bad("embeddings is NULL", [&] { negative.embeddings = nullptr; });
    bad("condition: mask has shape [2, 4]; expected [2, 4] of 0 and 1, a 1 in every row",
        [&] { captions.mask = mask, captions.mask_size = 8; });
    mask[4] = 0.5f;
    bad("a 1 in every row", [&] { captions.mask = mask, captions.mask_size = 8; });
    for (const std::size_t size : {std::size_t{0}, std::size_t{7}, std::size_t{9}, SIZE_MAX})
        bad("; expected 8", [&] { captions.mask = mask, captions.mask_size = size; });
    bad("captions: mask_size is 8; expected 0", [&] { captions.mask_size = 8; });
    for (const std::size_t size : {std::size_t{0}, std::size_t{23}, std::size_t{25}, SIZE_MAX})
        bad("; expected 24 embeddings", [&] { captions.size = size; });
    bad("negative captions: size is 0; expected 6 embeddings", [&] { negative.size = 0; });
    bad("dit_captions.struct_size is 0", [&] { captions.struct_size = 0; });
    bad("needs a newer libdit", [&] { negative.struct_size += 8; });
    embeddings[7] = NAN;
    refused("condition: captions holds values that are not finite");
}

TEST_P(Api, LabelsAlone) {
    dit_captions captions = DIT_CAPTIONS_INIT;
    float numbers = 1;
    captions.count = captions.tokens = 1;
    captions.embeddings = &numbers;
    captions.size = 1;
    const dit_request before = request;
    request.labels = nullptr;
    request.count = 0;
    request.captions = &captions;
    refused(generate(), DIT_BAD_ARGUMENT, "this bundle takes no captions; it takes labels, 0 to 4");
    request = before;
    dit_info info = DIT_INFO_INIT;
    ASSERT_EQ(dit_get_info(pipe.get(), &info), DIT_OK);
    EXPECT_EQ(info.caption_shape[0] + info.caption_shape[1], 0);
}

// Programs that were compiled before there were captions hand over smaller structs; what lies behind is not theirs.
TEST_P(Api, StructsOfTheFirstVersion) {
    const std::vector<float> expected = latents();
    request.struct_size = offsetof(dit_request, captions);
    std::memset(reinterpret_cast<char*>(&request) + request.struct_size, 0xAB, sizeof request - request.struct_size);
    EXPECT_EQ(latents(), expected);
    request = DIT_REQUEST_INIT;
    request.struct_size = offsetof(dit_request, captions) - 1;
    refused(generate(), DIT_BAD_ARGUMENT, "start from the _INIT value");
    dit_open_options early = options;
    early.struct_size = offsetof(dit_open_options, warm);
    std::memset(reinterpret_cast<char*>(&early) + early.struct_size, 0xAB, sizeof early - early.struct_size);
    pipe.reset(dit_new());
    ASSERT_EQ(dit_open(pipe.get(), bundle, &early), DIT_OK) << dit_message(pipe.get());
    dit_info info = DIT_INFO_INIT;
    info.struct_size = offsetof(dit_info, caption_shape);
    info.caption_shape[0] = info.caption_shape[1] = -7;
    ASSERT_EQ(dit_get_info(pipe.get(), &info), DIT_OK) << dit_message(pipe.get());
    EXPECT_EQ(info.num_classes, 5);
    EXPECT_STREQ(info.precision, "fp32");
    EXPECT_EQ(info.caption_shape[0], -7);
    EXPECT_EQ(info.caption_shape[1], -7);
}

TEST(Face, Captions) {
    dit::Pipeline pipe(CAPTIONED);
    dit::Request request;
    request.steps = 2;
    request.captions = {2, 4, std::vector<float>(24, 0.5f), {}};
    request.negative = {1, 1, {1, 2, 3}, {1}};
    const std::vector<float> first = pipe.generate_latents(request);
    EXPECT_EQ(first.size(), 2 * NUMBERS);
    EXPECT_EQ(pipe.generate(request).pixels.size(), 2 * PIXELS);
    request.captions.mask = {1, 1, 1, 1, 1, 0, 0, 0};
    EXPECT_EQ(pipe.generate_latents(request).size(), 2 * NUMBERS);
    const auto bad = [&](const char* words) {
        try {
            pipe.generate(request);
            ADD_FAILURE() << words;
        } catch (const dit::Error& error) {
            EXPECT_EQ(error.status, DIT_BAD_ARGUMENT);
            EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
        }
    };
    request.captions.mask.pop_back();
    bad("captions: mask_size is 7; expected 8");
    request.captions.mask.clear();
    request.captions.embeddings.pop_back();
    bad("captions: size is 23; expected 24 embeddings");
    request.captions = {};
    bad("condition lacks captions");
}

}  // namespace
