// Runs that start from a picture, without an engine: where they start, what is kept, what requests are refused.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "errors.hpp"
#include "images.hpp"
#include "loops.hpp"
#include "request.hpp"
#include "start.hpp"

namespace dit_runtime {
namespace {

constexpr std::int64_t SIDE = 32;

Pictures pictures(std::int64_t count, std::int64_t height = SIDE) {
    Pictures made{{count, height, SIDE, 3}, {}};
    for (std::size_t i = 0; i < dit_runtime::count(made.shape); ++i)
        made.bytes.push_back(static_cast<std::uint8_t>(i * 7 % 251));
    return made;
}

// Left of the middle is drawn anew; a grey place and those where no cell begins count for nothing.
Pictures mask(std::int64_t count = 1) {
    Pictures made{{count, SIDE, SIDE}, {}};
    for (std::int64_t place = 0; place < count * SIDE * SIDE; ++place) {
        const std::int64_t row = place / SIDE % SIDE, column = place % SIDE;
        const bool grey = row == 16 && column == 16, between = column > 16 && row % 8;
        made.bytes.push_back(grey ? 127 : column < 16 || between ? 128 : 0);
    }
    return made;
}

Request request() {
    Request request;
    request.labels = {1, 2};
    request.seeds = {4, 5};
    request.steps = 5;
    request.image = pictures(2);
    return request;
}

std::string refusal(const Manifest& manifest, const Request& request) {
    try {
        check(manifest, request);
    } catch (const UsageError& error) {
        return error.what();
    }
    return "nothing";
}

// As StableDiffusion3Img2ImgPipeline.get_timesteps, rounding included: 28 - 28 · 0.6 is 11.2.
TEST(Start, StepsThatAreLeftOut) {
    EXPECT_EQ(first_step(10, 0.3), 7u);
    EXPECT_EQ(first_step(10, 0.9), 1u);
    EXPECT_EQ(first_step(4, 0.6), 1u);
    EXPECT_EQ(first_step(50, 0.01), 49u);
    EXPECT_EQ(first_step(1, 0.2), 0u);
    EXPECT_EQ(first_step(28, 0.6), 11u);
    EXPECT_EQ(first_step(5, 1), 0u);
    EXPECT_EQ(first_step(5, {}), 2u);
}

TEST(Start, PicturesAreWhatTheyWere) {
    const Pictures some = pictures(2);
    EXPECT_EQ(to_uint8(to_unit(some.bytes, some.shape), {2, 3, SIDE, SIDE}), some.bytes);
}

// The stream gives the latents first, then the noise; a picture for all is there for each sample.
TEST(Start, DrawsLatentsThenNoise) {
    const Encoded encoded = {{MEAN, {1, 2, 3, 4, 5, 6, 7, 8}}, {LOGVAR, {0, 0, 0, 0, -2, -2, -2, -2}}};
    const Draw draw = dit_runtime::draw({4, 5}, 2), same = dit_runtime::draw({4, 5}, 2);
    const Start start(encoded, 2, {2, 2, 2}, draw, {{900, 0.5, 0.75}, {100, 0.9, 0.2}});
    const std::vector<float> first = same(16), noise = same(16);
    for (std::size_t i = 0; i < 16; ++i) {
        const double spread = i % 8 < 4 ? 1 : std::exp(-1.0);
        const double latent = static_cast<double>(i % 8 + 1) + spread * static_cast<double>(first[i]);
        const double z = static_cast<double>(noise[i]);
        EXPECT_DOUBLE_EQ(start.at(0)[i], 0.5 * latent + 0.75 * z);
        EXPECT_DOUBLE_EQ(start.at(1)[i], 0.9 * latent + 0.2 * z);
        EXPECT_DOUBLE_EQ(start.at(2)[i], latent);  // clean
    }
    Array state(16, 100);
    start.keep(1, state, {true, false, false, true});
    for (std::size_t i = 0; i < 16; ++i) EXPECT_EQ(state[i], i % 4 == 0 || i % 4 == 3 ? 100 : start.at(1)[i]) << i;
    start.keep(1, state, {true, true, true, true, true, true, true, false});  // of each sample
    for (std::size_t i = 0; i < 16; ++i) EXPECT_EQ(state[i] == 100, i % 4 == 0 || (i % 4 == 3 && i < 8)) << i;
    const Start certain({{MEAN, {1, 2, 3, 4, 5, 6, 7, 8}}}, 1, {2, 2, 2}, dit_runtime::draw({4}, 1), {{900, 0, 1}});
    const std::vector<float> alone = dit_runtime::draw({4}, 1)(8);
    EXPECT_EQ(certain.at(0), Array(alone.begin(), alone.end()));  // without a variance nothing is drawn before
}

// The state has what is kept after each evaluation, and the network's end of the path is that of this state.
TEST(Start, ATrajectoryKeeps) {
    const Process process;
    const Array times = plan(process, "ddim", 3);
    const Keep keep = [](std::size_t evaluations, Array& state) { state[1] = static_cast<double>(evaluations); };
    Trajectory masked({process, "ddim", 3, {0.5, 0.5}, draw({0}, 1)}, times, {3, Groups::OWN}, {}, {}, keep);
    Trajectory free({process, "ddim", 3, {0.5, 0.5}, draw({0}, 1)}, times, {3, Groups::OWN});
    const std::vector<Level> known = levels(process, "ddim", 3);
    EXPECT_EQ(masked.state(), (Array{0.5, 0.5}));
    for (std::size_t step = 0; step < 3; ++step) {
        const Prediction answer = {{0.25f, 0.125f}, {}};
        const double before = masked.state()[1], level = known[step].sigma;
        masked.tell(answer);
        free.tell(answer);
        EXPECT_EQ(masked.state()[0], free.state()[0]);
        EXPECT_EQ(masked.state()[1], static_cast<double>(step + 1));
        EXPECT_DOUBLE_EQ(masked.x0()[1], (before - level * 0.125) / known[step].alpha);
    }
}

TEST(Start, WhatARunNeeds) {
    const Manifest manifest = read(PICTURED);
    Request own = request();
    own.strength = 0.5;
    own.mask = mask();
    const Checked checked = check(manifest, own);
    EXPECT_EQ(checked.first, 2u);
    EXPECT_EQ(checked.levels.size(), 3u);
    const Array whole = plan(manifest.process, checked.solver, 5);
    EXPECT_EQ(checked.timesteps, Array(whole.begin() + 2, whole.end()));
    EXPECT_EQ(checked.image.size(), 2u * 3 * SIDE * SIDE);
    EXPECT_FLOAT_EQ(checked.image[1], static_cast<float>(own.image->bytes[3]) / 255);
    std::vector<bool> cells;
    for (int row = 0; row < 4; ++row) cells.insert(cells.end(), {true, true, false, false});
    EXPECT_EQ(checked.mask, cells);
    own.mask = mask(2);
    EXPECT_EQ(check(manifest, own).mask.size(), 32u);
    own.strength.reset();
    EXPECT_EQ(check(manifest, own).first, 2u);  // of 5 at 0.6
}

TEST(Start, APictureForAPort) {
    const Manifest manifest = read(ENLARGED);
    Request own;
    own.image = pictures(1);
    EXPECT_EQ(check(manifest, own).condition.rows, 1u);
    own.seeds = {1, 2, 3};  // one picture, a sample a seed
    const Checked checked = check(manifest, own);
    EXPECT_EQ(checked.condition.rows, 3u);
    EXPECT_EQ(checked.first, 0u);
    own.strength = 0.5;
    EXPECT_EQ(refusal(manifest, own), "got strength, but this bundle takes the image as low: leave it out");
    own.strength.reset();
    own.condition["low"] = {{1, 2, 4, 4}, std::vector<float>(32)};
    EXPECT_EQ(refusal(manifest, own), "got both an image and a condition with low: pass one of them");
    own.image.reset();
    own.seeds = {1};
    EXPECT_EQ(refusal(manifest, own), "nothing");
    own.condition.clear();
    EXPECT_EQ(refusal(manifest, own), "no image for low; pass one (dit-generate: --image), or a condition with low");
}

TEST(Start, WhatIsRefused) {
    const auto refused = [manifest = read(PICTURED)](const std::function<void(Request&)>& change) {
        Request own = request();
        change(own);
        return refusal(manifest, own);
    };
    EXPECT_EQ(refused([](Request& own) { own.image.reset(), own.strength = 0.5; }),
              "got strength without an image to start from");
    EXPECT_EQ(refused([](Request& own) { own.image.reset(), own.mask = mask(); }),
              "got mask without an image to start from");
    EXPECT_EQ(refused([](Request& own) { own.latents.emplace(64); }),
              "got both an image and latents to start from: pass one of them");
    EXPECT_EQ(refused([](Request& own) { own.strength = 0; }), "strength is 0; expected a number above 0, up to 1");
    EXPECT_EQ(refused([](Request& own) { own.strength = 1.5; }), "strength is 1.5; expected a number above 0, up to 1");
    EXPECT_EQ(refused([](Request& own) { own.strength = NAN; }), "strength is nan; expected a number above 0, up to 1");
    EXPECT_NE(refused([](Request& own) { own.strength = 1e-320; }).find("of 5 steps it leaves none"),
              std::string::npos);
    EXPECT_EQ(refused([](Request& own) { own.image = pictures(2, 31); }),
              "image has shape [2, 31, 32, 3]; expected [32, 32, 3], or one for each sample");
    EXPECT_EQ(refused([](Request& own) { own.image = pictures(3); }),
              "image has 3 pictures; expected one, or one for each of 2 samples");
    EXPECT_EQ(refused([](Request& own) { own.image = pictures(0); }),
              "image has shape [0, 32, 32, 3]; expected [32, 32, 3], or one for each sample");
    EXPECT_EQ(refused([](Request& own) { own.image->bytes.pop_back(); }),
              "image has shape [2, 32, 32, 3]; expected [32, 32, 3], or one for each sample");
    EXPECT_EQ(refused([](Request& own) { own.mask = mask(3); }),
              "mask has 3 pictures; expected one, or one for each of 2 samples");
    EXPECT_EQ(refused([](Request& own) { own.mask = Pictures{{31, 32}, std::vector<std::uint8_t>(31 * 32)}; }),
              "mask has shape [31, 32]; expected [32, 32], or one for each sample");
    EXPECT_EQ(refused([](Request&) {}), "nothing");
    EXPECT_EQ(refusal(read(BUNDLE), request()),
              "this bundle takes no pictures, for it has no encoder; build it with --encoder");
}

}  // namespace
}  // namespace dit_runtime
