// Pictures that go in, through the C ABI and its C++ face.
#include <cmath>
#include <functional>

#include "api.hpp"
#include "dit/dit.hpp"

namespace {

class Pictured : public Api {
  protected:
    explicit Pictured(const char* path = PICTURED) : Api(path) {
        for (std::size_t i = 0; i < sizeof image; ++i) image[i] = static_cast<uint8_t>(i * 7 % 251);
        for (std::size_t i = 0; i < sizeof mask; ++i) mask[i] = i % 32 < 16 ? 255 : 0;
    }
    void SetUp() override {
        Api::SetUp();
        request.seeds = seeds;
        request.num_seeds = 2;
    }
    void start() {
        request.image = image;
        request.image_size = sizeof image;
        request.num_images = 2;
        request.image_height = request.image_width = 32;
    }
    void bad(const char* words, const std::function<void()>& change) {
        const dit_request before = request;
        change();
        refused(generate(), DIT_BAD_ARGUMENT, words);
        request = before;
    }

    uint8_t image[2 * PIXELS], mask[32 * 32];
    const uint64_t seeds[2] = {4, 5};
};

class Enlarged : public Pictured {
  protected:
    Enlarged() : Pictured(ENLARGED) {}
};

INSTANTIATE_TEST_SUITE_P(Engines, Pictured, ::testing::Values("onnxruntime", "openvino"));
INSTANTIATE_TEST_SUITE_P(Engines, Enlarged, ::testing::Values("onnxruntime", "openvino"));

// Fewer steps change less of the picture; what a mask keeps is its latents, whatever else is drawn.
TEST_P(Pictured, StrengthAndMask) {
    const std::vector<float> plain = latents();
    start();
    request.strength = 0.25;
    const std::vector<float> little = latents();
    request.strength = DIT_DEFAULT;
    const std::vector<float> usual = latents();
    request.strength = 0.6;
    EXPECT_EQ(latents(), usual);  // the default's value
    EXPECT_NE(usual, little);
    EXPECT_NE(usual, plain);
    request.mask = mask;
    request.mask_size = sizeof mask;
    const std::vector<float> masked = latents();
    request.labels = labels + 2;
    request.strength = 1;
    const std::vector<float> other = latents();
    for (std::size_t i = 0; i < masked.size(); ++i)
        EXPECT_EQ(masked[i] == other[i], i % 4 >= 2) << i;  // the left half of 4 columns is drawn
    dit_run* run = nullptr;
    ASSERT_EQ(dit_run_new(pipe.get(), &request, &run), DIT_OK);
    std::vector<uint8_t> preview(2 * PIXELS);
    int more = 0;
    ASSERT_EQ(dit_run_step(run, &more), DIT_OK);
    EXPECT_EQ(dit_run_preview(run, preview.data(), preview.size()), DIT_OK);
    dit_run_free(run);
}

// The first picture's result does not depend on the one beside it, nor on how often it is there.
TEST_P(Pictured, OnePictureForAll) {
    start();
    request.num_images = 1;
    request.image_size = PIXELS;
    const std::vector<float> one = latents();
    std::copy(image, image + PIXELS, image + PIXELS);
    request.num_images = 2;
    request.image_size = 2 * PIXELS;
    EXPECT_EQ(latents(), one);
}

TEST_P(Pictured, Refusals) {
    std::vector<uint8_t> long_mask(3 * sizeof mask);
    bad("got strength without an image to start from", [&] { request.strength = 0.5; });
    bad("got mask without an image to start from", [&] { request.mask = mask, request.mask_size = sizeof mask; });
    bad("image is NULL", [&] { request.image_size = 1; });
    start();
    bad("image has 6143 bytes; expected 6144, for 2 of 32 x 32", [&] { --request.image_size; });
    bad("image has 6144 bytes; expected 0, for 0 of 32 x 32", [&] { request.num_images = 0; });
    bad("image has 6144 bytes; expected 0", [&] { request.image_height = 0; });
    bad("no memory holds that many", [&] { request.image_height = request.image_width = SIZE_MAX; });
    bad("no memory holds that many", [&] { request.num_images = SIZE_MAX; });
    bad("image has shape [2, 16, 64, 3]; expected [32, 32, 3], or one for each sample",
        [&] { request.image_height = 16, request.image_width = 64; });
    bad("strength is 0; expected a number above 0, up to 1", [&] { request.strength = 0; });
    bad("mask is NULL", [&] { request.mask_size = sizeof mask; });
    bad("mask has 1023 bytes; expected 1024", [&] { request.mask = mask, request.mask_size = sizeof mask - 1; });
    bad("mask has 3 pictures; expected one, or one for each of 2 samples",
        [&] { request.mask = long_mask.data(), request.mask_size = long_mask.size(); });
    bad("got both an image and latents", [&] { request.latents = numbers, request.latents_size = 64; });
    bad("no labels; pass at least one class name or number", [&] { request.labels = nullptr; });
    const float own[32] = {};
    dit_array array = DIT_ARRAY_INIT;
    array.name = "low", array.floats = own, array.rows = 1, array.size = 32;
    bad("unknown port", [&] { request.arrays = &array, request.num_arrays = 1; });
}

// The encoder opens when a request first needs it: one that is damaged hurts no other request.
TEST_P(Pictured, OpensWhenItIsNeeded) {
    const BundleCopy copy(PICTURED);
    std::string weights = copy.bytes("encoder.onnx.data");
    weights[0] = static_cast<char>(weights[0] ^ 1);
    copy.write("encoder.onnx.data", weights);
    pipe.reset(dit_new());
    ASSERT_EQ(dit_open(pipe.get(), copy.folder.c_str(), &options), DIT_OK) << dit_message(pipe.get());
    latents();
    start();
    refused(generate(), DIT_BAD_BUNDLE, "encoder.onnx.data");
}

// A program of an earlier version has no such fields.
TEST_P(Pictured, AnEarlierVersion) {
    const std::vector<float> plain = latents();
    start();
    request.struct_size = offsetof(dit_request, image);
    EXPECT_EQ(latents(), plain);
}

TEST_P(Pictured, Verify) {
    dit::OpenOptions own;
    own.backend = GetParam();
    dit::Pipeline open(PICTURED, own);
    std::vector<std::string> names;
    EXPECT_TRUE(open.verify([&](const dit::Check& check) {
        if (check.name.rfind("encoder: ", 0) != 0) return;
        names.push_back(check.name);
        EXPECT_EQ(check.limit, 60);
        EXPECT_GT(check.value, 100);
    }));
    EXPECT_EQ(names, (std::vector<std::string>{"encoder: mean of pictures, PSNR in dB",
                                               "encoder: logvar of pictures, PSNR in dB"}));
}

// One picture for a port, a sample a seed; it is not what the run starts from.
TEST_P(Enlarged, APictureForAPort) {
    dit::OpenOptions own;
    own.backend = GetParam();
    dit::Pipeline open(ENLARGED, own);
    dit::Request from;
    from.seeds = {4, 5};
    from.steps = 4;
    from.image = {{image, image + PIXELS}, 1, 32, 32};
    EXPECT_EQ(open.count(from), 2u);
    dit::Run run = open.run(from);
    const std::vector<float> noise = run.latents();
    const std::vector<float> drawn = open.generate_latents(from);
    ASSERT_EQ(drawn.size(), 2 * NUMBERS);
    from.image.pixels.assign(image + PIXELS, image + 2 * PIXELS);
    EXPECT_EQ(open.run(from).latents(), noise);
    EXPECT_NE(open.generate_latents(from), drawn);
    from.strength = 0.5;
    try {
        open.generate_latents(from);
        FAIL();
    } catch (const dit::Error& error) {
        EXPECT_STREQ(error.what(), "got strength, but this bundle takes the image as low: leave it out");
    }
}

}  // namespace
