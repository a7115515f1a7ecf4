// Runs that the caller steps, through the C ABI and its C++ face.
#include <filesystem>
#include <memory>
#include <thread>

#include "api.hpp"
#include "dit/dit.hpp"

namespace {

struct FreeRun {
    void operator()(dit_run* run) const { dit_run_free(run); }
};
using RunHandle = std::unique_ptr<dit_run, FreeRun>;

class Stepped : public Api {
  protected:
    RunHandle begin() {
        dit_run* run = nullptr;
        EXPECT_EQ(dit_run_new(pipe.get(), &request, &run), DIT_OK) << dit_message(pipe.get());
        return RunHandle(run);
    }

    std::vector<float> state(const RunHandle& run) {
        std::vector<float> state(request.count * NUMBERS);
        EXPECT_EQ(dit_run_latents(run.get(), state.data(), state.size()), DIT_OK) << dit_message(pipe.get());
        return state;
    }
};

INSTANTIATE_TEST_SUITE_P(Engines, Stepped, ::testing::Values("onnxruntime", "openvino"));

TEST_P(Stepped, IsWhatARunAtOnceIs) {
    for (const char* solver : {"ddim", "ddpm", "dpm++3"}) {
        request.solver = solver;
        const std::vector<float> whole = latents();
        const RunHandle run = begin();
        const std::vector<float> noise = state(run);
        int more = 0, steps = 0;
        do {
            ASSERT_EQ(dit_run_step(run.get(), &more), DIT_OK) << dit_message(pipe.get());
            ++steps;
        } while (more);
        EXPECT_EQ(steps, 4);
        EXPECT_EQ(state(run), whole) << solver;
        EXPECT_NE(noise, whole);
        EXPECT_EQ(dit_run_step(run.get(), &more), DIT_OK);  // nothing is left to do
        EXPECT_EQ(more, 0);
        EXPECT_EQ(state(run), whole);
    }
}

// Its values stand in the fields that the request leaves out, and in no other.
TEST_P(Stepped, APresetFillsWhatIsLeftOut) {
    EXPECT_STREQ(dit_preset(pipe.get(), 0), "lean");
    EXPECT_STREQ(dit_preset(pipe.get(), 1), "quick");
    EXPECT_EQ(dit_preset(pipe.get(), 2), nullptr);
    const float weak = 2.0f, strong = 5.0f;
    const auto drawn = [&](const char* preset, int steps, const float* guidance, const char* solver) {
        request.preset = preset;
        request.steps = steps;
        request.guidance = guidance;
        request.num_guidance = guidance ? 1 : 0;
        request.solver = solver;
        request.spacing = preset ? nullptr : "trailing";
        return latents();
    };
    const std::vector<float> quick = drawn("quick", 0, nullptr, nullptr);
    EXPECT_EQ(quick, drawn(nullptr, 3, &weak, "dpm++"));
    EXPECT_NE(quick, drawn(nullptr, 4, &weak, "dpm++"));
    EXPECT_EQ(drawn("quick", 4, nullptr, nullptr), drawn(nullptr, 4, &weak, "dpm++"));
    EXPECT_EQ(drawn("quick", 0, &strong, "dpm++1"), drawn(nullptr, 3, &strong, "dpm++1"));
    request = DIT_REQUEST_INIT;
    request.labels = labels;
    request.count = 2;
    request.preset = "lean";
    const std::vector<float> lean = latents();
    request.preset = nullptr;
    request.steps = 6;
    request.guidance_interval[0] = 0.3;
    request.guidance_interval[1] = 0.9;
    request.guidance_policy = "rescale guidance_rescale=0.5";
    request.cache = "taylorseer";
    request.cache_interval = 2;
    request.max_order = 0;
    request.disable_cache_before_step = 2;
    request.disable_cache_after_step = -1;
    EXPECT_EQ(lean, latents());
    request.max_order = 1;
    const std::vector<float> bent = latents();
    EXPECT_NE(lean, bent);
    request.preset = "lean";
    EXPECT_EQ(latents(), bent);
    request.preset = "quack";
    refused(generate(), DIT_BAD_ARGUMENT, "preset 'quack' is not known (did you mean \"quick\"?); known: lean, quick");
}

// A service has several runs under way; what a caller does between two steps changes nothing.
TEST_P(Stepped, RunsTakeTurns) {
    std::vector<std::vector<float>> expected;
    std::vector<RunHandle> runs;
    const uint64_t seeds[3] = {5, 6, 7};
    request.num_seeds = 1;
    for (const uint64_t& seed : seeds) {
        request.seeds = &seed;
        expected.push_back(latents());
        runs.push_back(begin());
    }
    int more = 1;
    for (int step = 0; step < 3; ++step)
        for (const RunHandle& run : runs) EXPECT_EQ(dit_run_step(run.get(), &more), DIT_OK);
    runs[1].reset();  // left half way
    for (const std::size_t index : {std::size_t{0}, std::size_t{2}}) {
        EXPECT_EQ(dit_run_step(runs[index].get(), &more), DIT_OK);
        EXPECT_EQ(more, 0);
        EXPECT_EQ(state(runs[index]), expected[index]);
    }
}

TEST_P(Stepped, AResultDoesWhatIsLeft) {
    ASSERT_EQ(dit_generate(pipe.get(), &request, pixels, sizeof pixels), DIT_OK) << dit_message(pipe.get());
    const std::vector<uint8_t> whole(pixels, pixels + 2 * PIXELS);
    const RunHandle run = begin();
    int more = 0;
    EXPECT_EQ(dit_run_step(run.get(), &more), DIT_OK);
    EXPECT_EQ(dit_run_result(run.get(), pixels, sizeof pixels), DIT_OK) << dit_message(pipe.get());
    EXPECT_EQ(std::vector<uint8_t>(pixels, pixels + 2 * PIXELS), whole);
}

TEST_P(Stepped, RowsOfAnInterval) {
    request.steps = 8;
    const std::vector<float> plain = latents();
    const auto counted = [&](std::int64_t expected, std::int64_t planned) {
        const RunHandle run = begin();
        std::int64_t rows = -1, whole = 0;
        for (int more = 1; more;) {
            EXPECT_EQ(dit_run_step(run.get(), &more), DIT_OK) << dit_message(pipe.get());
            EXPECT_EQ(dit_run_rows(run.get(), &rows, &whole), DIT_OK);
            EXPECT_EQ(whole, planned);
        }
        EXPECT_EQ(rows, expected);
        return state(run);
    };
    EXPECT_EQ(counted(16, 16), plain);
    request.guidance_policy = "constant";
    EXPECT_EQ(counted(16, 16), plain);
    request.guidance_interval[1] = 0.999999;  // its first step is at t = 0.875, so this is all of it
    EXPECT_EQ(counted(16, 16), plain);
    request.guidance_interval[0] = 0.3, request.guidance_interval[1] = 0.6;  // two of eight steps
    const std::vector<float> some = counted(10, 10);
    EXPECT_NE(some, plain);
    request.guidance_policy = "apg";
    const std::vector<float> projected = counted(10, 10);
    EXPECT_NE(projected, some);
    request.guidance_policy = "rescale guidance_rescale=0";  // linear, on the host
    const std::vector<float> apart = counted(10, 10);
    for (std::size_t i = 0; i < some.size(); ++i) EXPECT_NEAR(apart[i], some[i], 1e-4 * (1 + std::abs(some[i])));
    request.guidance_policy = nullptr;
    request.cache = "taylorseer";
    request.disable_cache_before_step = 0;
    EXPECT_NE(counted(6, 6), some);
    request.cache_interval = 1;
    EXPECT_EQ(counted(10, 10), some);
    request.cache_interval = request.disable_cache_before_step = DIT_DEFAULT;
    request.cache = "easycache";
    request.cache_threshold = 0;
    EXPECT_EQ(counted(10, -1), some);
}

TEST_P(Stepped, RefusalsOfPolicies) {
    dit_run* none = nullptr;
    const auto bad = [&](const char* words) {
        refused(dit_run_new(pipe.get(), &request, &none), DIT_BAD_ARGUMENT, words);
    };
    request.guidance_interval[0] = 2;
    bad("guidance_interval is (2, 1)");
    request.guidance_interval[0] = 0;
    request.guidance_policy = "linear";
    bad("guidance_policy 'linear' is not known");
    request.guidance_policy = nullptr;
    request.max_order = 1;
    bad("got max_order without a cache");
    request.cache = "taylorseer";
    request.max_order = 3;
    bad("max_order is 3");
    request.max_order = DIT_DEFAULT;
    const RunHandle run = begin();
    int64_t rows = 0;
    EXPECT_EQ(dit_run_rows(run.get(), &rows, nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_run_rows(nullptr, &rows, &rows), DIT_BAD_ARGUMENT);
}

TEST_P(Stepped, Cancel) {
    const RunHandle run = begin();
    int more = 0;
    EXPECT_EQ(dit_run_step(run.get(), &more), DIT_OK);
    const std::vector<float> before = state(run);
    std::thread([&] { dit_run_cancel(run.get()); }).join();
    refused(dit_run_step(run.get(), &more), DIT_STOPPED, "stopped after step 1 of 4");
    refused(dit_run_result(run.get(), pixels, sizeof pixels), DIT_STOPPED, "stopped after step 1 of 4");
    EXPECT_EQ(state(run), before);
}

TEST_P(Stepped, Refusals) {
    dit_run* none = reinterpret_cast<dit_run*>(&request);
    refused(dit_run_new(pipe.get(), nullptr, &none), DIT_BAD_ARGUMENT, "dit_request is NULL");
    EXPECT_EQ(none, nullptr);
    refused(dit_run_new(pipe.get(), &request, nullptr), DIT_BAD_ARGUMENT, "run is NULL");
    request.steps = -1;
    refused(dit_run_new(pipe.get(), &request, &none), DIT_BAD_ARGUMENT, "steps is -1");
    request.steps = 4;
    request.count = SIZE_MAX;
    refused(dit_run_new(pipe.get(), &request, &none), DIT_BAD_ARGUMENT, "no memory holds that many");
    EXPECT_EQ(none, nullptr);
    request.count = 2;
    const RunHandle run = begin();
    refused(dit_run_step(run.get(), nullptr), DIT_BAD_ARGUMENT, "more is NULL");
    refused(dit_run_latents(run.get(), numbers, 63), DIT_BUFFER_TOO_SMALL, "expected 64");
    refused(dit_run_latents(run.get(), nullptr, 64), DIT_BAD_ARGUMENT, "latents is NULL");
    refused(dit_run_result(run.get(), pixels, sizeof pixels - 1), DIT_BUFFER_TOO_SMALL, "expected 6144");
    int more = 0;
    EXPECT_EQ(dit_run_step(nullptr, &more), DIT_BAD_ARGUMENT);
    dit_run_cancel(nullptr);
    dit_run_free(nullptr);
    const Handle empty(dit_new());
    EXPECT_EQ(dit_run_new(empty.get(), &request, &none), DIT_BAD_ARGUMENT);
}

TEST_P(Stepped, LowMemoryTakesTurnsToo) {
    const std::vector<float> expected = latents();
    options.low_memory = 1;
    const Handle lean(dit_new());
    ASSERT_EQ(dit_open(lean.get(), BUNDLE, &options), DIT_OK) << dit_message(lean.get());
    dit_run* made = nullptr;
    ASSERT_EQ(dit_run_new(lean.get(), &request, &made), DIT_OK);
    const RunHandle run(made);
    int more = 1;
    while (more) ASSERT_EQ(dit_run_step(run.get(), &more), DIT_OK) << dit_message(lean.get());
    std::vector<float> state(2 * NUMBERS);
    ASSERT_EQ(dit_run_latents(run.get(), state.data(), state.size()), DIT_OK);
    for (std::size_t i = 0; i < state.size(); ++i) EXPECT_NEAR(state[i], expected[i], 1e-5);
}

TEST(Face, ARunIsStepped) {
    dit::Pipeline pipe(BUNDLE);
    dit::Request request;
    request.labels = {1, 3};
    request.steps = 3;
    int steps = 0;
    request.on_step = [&](int, int, const double*, std::size_t) { return ++steps == 99; };
    dit::Run run = pipe.run(request);
    EXPECT_TRUE(run.step());
    dit::Run moved = std::move(run);
    EXPECT_TRUE(moved.step());
    EXPECT_FALSE(moved.step());
    EXPECT_EQ(steps, 3);
    EXPECT_EQ(moved.latents(), pipe.generate_latents(request));
    EXPECT_EQ(moved.rows().done, 6);
    EXPECT_EQ(moved.rows().planned, 6);
    EXPECT_EQ(moved.result().pixels, pipe.generate(request).pixels);
    dit::Run other = pipe.run(request);
    other.cancel();
    EXPECT_THROW(other.step(), dit::Error);
    request.on_step = [](int, int, const double*, std::size_t) -> bool { throw std::out_of_range("mine"); };
    dit::Run third = pipe.run(request);
    EXPECT_THROW(third.step(), std::out_of_range);
    request.on_step = {};
    request.cache = "taylorseer";
    request.max_order = 0;
    request.disable_cache_before_step = 1;
    request.guidance_policy = "apg eta=0.5";
    request.guidance_interval[1] = 0.99;
    EXPECT_EQ(pipe.run(request).rows().planned, 4);
    request.labels = {9};
    EXPECT_THROW(pipe.run(request), dit::Error);
}

}  // namespace
