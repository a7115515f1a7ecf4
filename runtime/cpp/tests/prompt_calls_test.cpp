// Token ids and embedded guidance through the C ABI and its C++ face.
#include <cmath>
#include <functional>

#include "api.hpp"
#include "dit/dit.hpp"
#include "npz.hpp"
#include "sha256.hpp"

namespace {

// Two prompts, and an empty negative one.
class Prompted : public Api {
  protected:
    Prompted() : Api(PROMPTED) {}

    void SetUp() override {
        Api::SetUp();
        request.labels = nullptr;
        request.count = 0;
        request.arrays = arrays;
        request.num_arrays = 4;
        request.negative_arrays = negatives;
        request.num_negative_arrays = 3;
        arrays[3].name = "rate", arrays[3].floats = rates, arrays[3].rows = arrays[3].size = 2;
    }

    static dit_array of(const char* name, const int64_t* integers, std::size_t rows, std::size_t tokens) {
        dit_array array = DIT_ARRAY_INIT;
        array.name = name, array.integers = integers, array.rows = rows, array.size = rows * tokens;
        return array;
    }

    std::vector<float> draw() {
        std::vector<float> state(2 * NUMBERS);
        EXPECT_EQ(dit_generate_latents(pipe.get(), &request, state.data(), state.size()), DIT_OK)
            << dit_message(pipe.get());
        return state;
    }

    void bad(const char* sentence, const std::function<void()>& change) {
        const dit_request before = request;
        const dit_array first = arrays[0], third = arrays[2];
        change();
        EXPECT_EQ(dit_generate_latents(pipe.get(), &request, numbers, std::size(numbers)), DIT_BAD_ARGUMENT);
        EXPECT_NE(std::string(dit_message(pipe.get())).find(sentence), std::string::npos) << dit_message(pipe.get());
        request = before, arrays[0] = first, arrays[2] = third;
        draw();
    }

    int64_t ids[10] = {2, 4, 6, 0, 0, 2, 5, 7, 1, 0}, masks[10] = {1, 1, 1, 0, 0, 1, 1, 1, 1, 0};
    int64_t others[8] = {2, 4, 0, 0, 3, 1, 4, 0}, none[5] = {3, 0, 0, 0, 0}, none_mask[5] = {1, 0, 0, 0, 0},
            pads[4] = {};
    float rates[2] = {0.5f, 1.0f};
    dit_array arrays[4] = {of("ids", ids, 2, 5), of("ids_mask", masks, 2, 5), of("ids_2", others, 2, 4),
                           DIT_ARRAY_INIT};
    dit_array negatives[3] = {of("ids", none, 1, 5), of("ids_mask", none_mask, 1, 5), of("ids_2", pads, 1, 4)};
};

INSTANTIATE_TEST_SUITE_P(Engines, Prompted, ::testing::Values("onnxruntime", "openvino"));

TEST_P(Prompted, WhatAPromptBecomes) {
    ASSERT_EQ(dit_prompt_count(pipe.get()), 2u);
    EXPECT_EQ(dit_prompt_count(nullptr), 0u);
    dit_prompt prompt = DIT_PROMPT_INIT;
    ASSERT_EQ(dit_get_prompt(pipe.get(), 0, &prompt), DIT_OK);
    EXPECT_STREQ(prompt.ids, "ids");
    EXPECT_STREQ(prompt.mask, "ids_mask");
    EXPECT_STREQ(prompt.tokenizer, "tokenizer.json");
    EXPECT_STREQ(prompt.prompt_template, "a {}");
    EXPECT_STREQ(prompt.negative_template, "no {}");
    EXPECT_EQ(prompt.tokens, 5);
    EXPECT_EQ(prompt.size, 8);
    EXPECT_EQ(prompt.lowercase, 1);
    ASSERT_EQ(dit_get_prompt(pipe.get(), 1, &prompt), DIT_OK);
    EXPECT_STREQ(prompt.mask, "");
    EXPECT_STREQ(prompt.negative_template, "{}");
    EXPECT_EQ(prompt.lowercase, 0);
    EXPECT_EQ(dit_get_prompt(pipe.get(), 2, &prompt), DIT_BAD_ARGUMENT);
    EXPECT_NE(std::string(dit_message(pipe.get())).find("this bundle has 2"), std::string::npos);
    EXPECT_EQ(dit_get_prompt(pipe.get(), 0, nullptr), DIT_BAD_ARGUMENT);
    prompt.struct_size += 8;
    EXPECT_EQ(dit_get_prompt(pipe.get(), 0, &prompt), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_verify(pipe.get(), nullptr, nullptr), DIT_OK) << dit_message(pipe.get());
}

TEST_P(Prompted, EachTokenIsRead) {
    const std::vector<float> first = draw();
    EXPECT_EQ(draw(), first);
    const auto changes = [&](int64_t& number, int64_t other) {
        std::swap(number, other);
        const std::vector<float> state = draw();
        std::swap(number, other);
        return state != first;
    };
    EXPECT_TRUE(changes(ids[1], 5));
    EXPECT_TRUE(changes(masks[2], 0));
    EXPECT_TRUE(changes(others[7], 2));
    EXPECT_TRUE(changes(none[0], 5));
    EXPECT_TRUE(changes(pads[0], 1));
    EXPECT_FALSE(changes(ids[4], 5));  // behind the mask
    const float alone = 1;
    request.guidance = &alone;
    request.num_guidance = 1;
    const std::vector<float> unguided = draw();
    EXPECT_NE(unguided, first);
    request.num_negative_arrays = 0;
    EXPECT_EQ(draw(), unguided);
}

// A prompt's picture does not depend on the prompts beside it.
TEST_P(Prompted, APromptAlone) {
    const uint64_t seeds[2] = {8, 9};
    request.seeds = seeds;
    request.num_seeds = 2;
    const std::vector<float> both = draw();
    for (dit_array& array : arrays) {
        array.size /= 2, array.rows = 1;
        if (array.integers) array.integers += array.size;
    }
    arrays[3].floats += 1;
    request.seeds += 1;
    request.num_seeds = 1;
    std::vector<float> second(NUMBERS);
    ASSERT_EQ(dit_generate_latents(pipe.get(), &request, second.data(), second.size()), DIT_OK);
    for (std::size_t i = 0; i < NUMBERS; ++i) EXPECT_NEAR(second[i], both[NUMBERS + i], 1e-5);
}

TEST_P(Prompted, Refusals) {
    const float wrong[10] = {1.5f};
    bad("no prompt; pass its token ids as ids, ids_mask, ids_2", [&] { request.arrays += 3, request.num_arrays = 1; });
    bad("condition lacks rate", [&] { request.num_arrays = 3; });
    bad("ids has shape [2, 4]; expected [rows, 5]", [&] { arrays[0].size = 8; });
    bad("condition has the unknown port 'ids2' (did you mean \"ids_2\"?)", [&] { arrays[2].name = "ids2"; });
    const int64_t outside[8] = {5};
    bad("ids_2 holds other values than the integers from 0 to 4", [&] { arrays[2].integers = outside; });
    bad("ids holds other values than the integers from 0 to 7",
        [&] { arrays[0].integers = nullptr, arrays[0].floats = wrong; });
    bad("guidance needs a negative with ids, ids_mask, ids_2", [&] { request.num_negative_arrays = 0; });
    bad("guidance needs a negative with ids_2", [&] { request.num_negative_arrays = 2; });
}

TEST(Face, Prompts) {
    dit::Pipeline pipe(PROMPTED), labels(BUNDLE);
    EXPECT_TRUE(labels.prompts().empty());
    const std::vector<dit::Prompt> prompts = pipe.prompts();
    ASSERT_EQ(prompts.size(), 2u);
    EXPECT_EQ(prompts[0].mask, "ids_mask");
    EXPECT_EQ(prompts[1].tokens, 4);
    dit::Request request;
    request.steps = 2;
    request.condition["ids"] = {1, {}, {2, 4, 6, 0, 0}};
    request.condition["ids_mask"] = {1, {}, {1, 1, 1, 0, 0}};
    request.condition["ids_2"] = {1, {}, {2, 0, 0, 0}};
    request.condition["rate"] = {1, {0.0f}, {}};
    request.negative_condition = request.condition;
    request.negative_condition.erase("rate");
    const std::vector<float> same = pipe.generate_latents(request);
    EXPECT_EQ(same.size(), NUMBERS);
    request.negative_condition["ids"].integers[1] = 5;
    EXPECT_NE(pipe.generate_latents(request), same);
    request.negative_condition.clear();
    EXPECT_THROW(pipe.generate_latents(request), dit::Error);
}

class Embedded : public Api {
  protected:
    Embedded() : Api(EMBEDDED) {}
};

INSTANTIATE_TEST_SUITE_P(Engines, Embedded, ::testing::Values("onnxruntime", "openvino"));

// Steps and guidance of the bundle where a request names none.
TEST_P(Embedded, DefaultsOfTheBundle) {
    dit_info info = DIT_INFO_INIT;
    ASSERT_EQ(dit_get_info(pipe.get(), &info), DIT_OK);
    EXPECT_EQ(info.steps, 3);
    EXPECT_EQ(info.guidance, 3.5);
    EXPECT_STREQ(info.guidance_port, "strength");
    request.steps = 0;
    const std::vector<float> first = latents();
    const float same[2] = {3.5f, 3.5f}, other = 6;
    request.steps = 3;
    request.guidance = same;
    request.num_guidance = 2;
    EXPECT_EQ(latents(), first);
    request.steps = 4;
    EXPECT_NE(latents(), first);
    request.steps = 3;
    request.guidance = &other;
    request.num_guidance = 1;
    EXPECT_NE(latents(), first);
    EXPECT_EQ(dit_verify(pipe.get(), nullptr, nullptr), DIT_OK) << dit_message(pipe.get());
}

TEST_P(Embedded, TheWeightAsACondition) {
    const float weights[2] = {1, 2};
    request.guidance = weights;
    request.num_guidance = 2;
    const std::vector<float> expected = latents();
    dit_array array = DIT_ARRAY_INIT;
    array.name = "strength", array.floats = weights, array.rows = array.size = 2;
    request.arrays = &array;
    request.num_arrays = 1;
    EXPECT_EQ(generate(), DIT_BAD_ARGUMENT);
    EXPECT_NE(std::string(dit_message(pipe.get())).find("got both guidance and a condition with strength"),
              std::string::npos);
    request.guidance = nullptr;
    request.num_guidance = 0;
    EXPECT_EQ(latents(), expected);
    request.num_arrays = 0;
    request.negative_arrays = &array;
    request.num_negative_arrays = 1;
    EXPECT_EQ(generate(), DIT_BAD_ARGUMENT);
    EXPECT_NE(std::string(dit_message(pipe.get())).find("takes its guidance as strength, and no negative"),
              std::string::npos);
}

// A reference is replayed with its own weights: those of a bundle whose port reads others are noticed.
TEST_P(Embedded, TheWeightsOfTheReferenceAreVerified) {
    const BundleCopy copy(EMBEDDED);
    std::string content = copy.bytes("reference.npz");
    const float weights[2] = {4, 2}, others[2] = {4, 3};
    const std::string from(reinterpret_cast<const char*>(weights), 8), to(reinterpret_cast<const char*>(others), 8);
    const std::size_t place = content.find(from);
    ASSERT_NE(place, std::string::npos);
    content.replace(place, 8, to);
    seal_npz(content);
    copy.write("reference.npz", content);
    copy.edit([&](nlohmann::json& table) {
        table["files"]["reference.npz"]["sha256"] = dit_runtime::sha256(copy.folder / "reference.npz");
    });
    const Handle fresh(dit_new());
    ASSERT_EQ(dit_open(fresh.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(fresh.get());
    EXPECT_EQ(dit_verify(fresh.get(), nullptr, nullptr), DIT_NOT_VERIFIED) << dit_message(fresh.get());
}

}  // namespace
