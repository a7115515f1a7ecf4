// A bundle that draws several sizes: 32 x 32, the first, and 32 x 64.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "dit/dit.hpp"

namespace {

const char* const WIDE = "32x64";

dit::Request request(const std::string& size = {}) {
    dit::Request request;
    request.labels = {1, 3};
    request.steps = 3;
    request.seeds = {5};
    request.size = size;
    return request;
}

template <typename Call>
void refused(dit_status status, const std::string& words, const Call& call) {
    try {
        call();
        ADD_FAILURE() << "not refused: " << words;
    } catch (const dit::Error& error) {
        EXPECT_EQ(error.status, status);
        EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
}

}  // namespace

TEST(Sizes, AreListed) {
    dit::Pipeline pipe(SIZES);
    const std::vector<dit::Size> sizes = pipe.sizes();
    ASSERT_EQ(sizes.size(), 2u);
    EXPECT_EQ(sizes[0].name, "32");
    EXPECT_EQ(sizes[1].name, WIDE);
    EXPECT_EQ(sizes[1].state, (std::vector<std::int64_t>{2, 4, 8}));
    EXPECT_EQ(sizes[1].height, 32u);
    EXPECT_EQ(sizes[1].width, 64u);
    dit_size size = DIT_SIZE_INIT;
    EXPECT_EQ(dit_model_size(pipe.get(), 2, &size), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit::Pipeline(BUNDLE).sizes().at(0).name, "");
}

TEST(Sizes, AreDrawnByOnePipeline) {
    dit::Pipeline pipe(SIZES);
    const dit::Images first = pipe.generate(request()), wide = pipe.generate(request(WIDE));
    EXPECT_EQ(first.width, 32u);
    EXPECT_EQ(wide.width, 64u);
    EXPECT_EQ(wide.pixels.size(), 2u * 32 * 64 * 3);
    EXPECT_EQ(pipe.generate(request("32x32")).pixels, first.pixels);
    EXPECT_EQ(pipe.generate_latents(request(WIDE)).size(), 2u * 2 * 4 * 8);

    dit::Run run = pipe.run(request(WIDE));
    EXPECT_TRUE(run.step());
    EXPECT_EQ(run.latents().size(), 2u * 2 * 4 * 8);
    EXPECT_EQ(run.result().pixels, wide.pixels);

    dit::OpenOptions options;
    options.size = WIDE;
    options.low_memory = true;
    dit::Pipeline at_wide(SIZES, options);
    EXPECT_EQ(at_wide.info().image_shape[1], 64);
    EXPECT_EQ(at_wide.generate(request()).pixels, wide.pixels);
    EXPECT_EQ(at_wide.generate(request("32")).pixels, first.pixels);
}

TEST(Sizes, OfLatentsToStartFrom) {
    dit::Pipeline pipe(SIZES);
    dit::Request from = request(WIDE);
    from.latents.assign(2 * 2 * 4 * 8, 0.5f);
    EXPECT_EQ(pipe.generate(from).pixels.size(), 2u * 32 * 64 * 3);
    from.size.clear();
    refused(DIT_BAD_ARGUMENT, "latents have 128 numbers; expected 64", [&] { pipe.generate(from); });
}

TEST(Sizes, OthersAreRefused) {
    const std::string words = "size 64 is not in this bundle; it has 32, 32x64";
    dit::Pipeline pipe(SIZES);
    refused(DIT_BAD_ARGUMENT, words, [&] { pipe.generate(request("64x64")); });
    refused(DIT_BAD_ARGUMENT, words, [&] { pipe.run(request("64")); });
    dit::OpenOptions options;
    options.size = "64";
    refused(DIT_BAD_ARGUMENT, words, [&] { dit::Pipeline(SIZES, options); });
    refused(DIT_BAD_ARGUMENT, "size 64 is not in this bundle; it has one size",
            [&] { dit::Pipeline(BUNDLE).generate(request("64")); });
}

TEST(Sizes, AreVerified) {
    const BundleCopy copy(SIZES);
    const auto failures = [&] {
        std::vector<std::string> all, failed;
        dit::Pipeline(copy.folder.string()).verify([&](const dit::Check& check) {
            all.push_back(check.name);
            if (!check.passed) failed.push_back(check.name);
        });
        EXPECT_EQ(all.front(), "sampler: betas that differ");
        EXPECT_NE(std::find(all.begin(), all.end(), "32x64: denoiser-32x64: prediction, rel-L2"), all.end());
        return failed;
    };
    EXPECT_TRUE(failures().empty());
    copy.edit([](nlohmann::json& table) { table["sizes"][0]["process"]["beta_end"] = 0.03; });
    const std::vector<std::string> failed = failures();
    EXPECT_FALSE(failed.empty());
    for (const std::string& name : failed) EXPECT_EQ(name.rfind("32x64: ", 0), 0u) << name;
}

TEST(Sizes, HaveTheirFilesCheckedWhenTheyOpen) {
    const BundleCopy copy(SIZES);
    std::string content = copy.bytes("denoiser-32x64.onnx.data");
    content[0] = static_cast<char>(content[0] + 1);
    copy.write("denoiser-32x64.onnx.data", content);
    dit::Pipeline pipe(copy.folder.string());
    EXPECT_EQ(pipe.generate(request()).width, 32u);
    refused(DIT_BAD_BUNDLE, "denoiser-32x64.onnx.data does not have the sha256", [&] { pipe.generate(request(WIDE)); });
}
