// One model in several threads, counted; and runs that are used by two threads at once.
#include <algorithm>
#include <future>
#include <thread>

#include "api.hpp"
#include "dit/dit.hpp"

namespace {

class Model : public Api {
  protected:
    void SetUp() override {
        Api::SetUp();
        if (IsSkipped()) return;
        dit_model* opened = nullptr;
        ASSERT_EQ(dit_model_open(BUNDLE, &options, &opened), DIT_OK) << dit_last_message();
        model.reset(opened);
    }

    struct Release {
        void operator()(dit_model* model) const { dit_model_release(model); }
    };
    std::unique_ptr<dit_model, Release> model;
};

INSTANTIATE_TEST_SUITE_P(Engines, Model, ::testing::Values("onnxruntime", "openvino"));

// What a thread draws does not depend on the others, and in the meantime the model answers.
TEST_P(Model, FourThreadsDrawWhatEachDrawsAlone) {
    constexpr int THREADS = 4;
    const auto draw = [&](int index) {
        dit_request own = request;
        own.labels = labels + index;
        const uint64_t seed = static_cast<uint64_t>(index);
        own.seeds = &seed, own.num_seeds = 1;
        own.solver = index % 2 ? "ddpm" : nullptr;
        std::vector<float> numbers(own.count * NUMBERS);
        EXPECT_EQ(dit_model_generate_latents(model.get(), &own, numbers.data(), numbers.size()), DIT_OK)
            << dit_last_message();
        return numbers;
    };
    std::vector<std::vector<float>> alone;
    for (int index = 0; index < THREADS; ++index) alone.push_back(draw(index));
    std::vector<std::future<std::vector<float>>> together;
    for (int index = 0; index < THREADS; ++index) together.push_back(std::async(std::launch::async, draw, index));
    for (int count = 0; count < 100; ++count) {
        dit_info info = DIT_INFO_INIT;
        EXPECT_EQ(dit_model_info(model.get(), &info), DIT_OK) << dit_last_message();
        EXPECT_EQ(info.num_ports, 1u);
        EXPECT_EQ(info.num_sizes, 1u);
        EXPECT_EQ(info.num_presets, 2u);
        EXPECT_EQ(info.num_prompts, 0u);
    }
    for (int index = 0; index < THREADS; ++index)
        EXPECT_EQ(together[static_cast<std::size_t>(index)].get(), alone[static_cast<std::size_t>(index)]) << index;
}

// Stops a drawing in its first step until the test lets it go.
struct Gate {
    static int wait(int step, int, const double*, size_t, void* user) {
        Gate& gate = *static_cast<Gate*>(user);
        if (step == 1) gate.inside.set_value(), gate.opened.get_future().wait();
        return 0;
    }
    std::promise<void> inside, opened;
};

// Each thread has its own message.
TEST_P(Model, APipelineThatDrawsIsNotBusy) {
    Gate gate;
    dit_request slow = request;
    slow.on_step = Gate::wait;
    slow.user = &gate;
    std::thread first([&] {
        EXPECT_EQ(dit_generate(pipe.get(), &slow, pixels, sizeof pixels), DIT_OK) << dit_last_message();
        EXPECT_STREQ(dit_message(pipe.get()), "");
    });
    gate.inside.get_future().wait();
    dit_info info = DIT_INFO_INIT;
    int64_t label = -1;
    EXPECT_EQ(dit_get_info(pipe.get(), &info), DIT_OK);
    EXPECT_EQ(dit_find_label(pipe.get(), "ant", &label), DIT_OK);
    refused(dit_find_label(pipe.get(), "ants", &label), DIT_BAD_ARGUMENT, "did you mean \"ant\"?");  // and draws
    EXPECT_EQ(dit_find_label(pipe.get(), "ants", &label), DIT_BAD_ARGUMENT);
    gate.opened.set_value();
    first.join();
    EXPECT_STRNE(dit_last_message(), "");
}

TEST_P(Model, ARunIsOneThreadsAtATime) {
    Gate gate;
    request.on_step = Gate::wait;
    request.user = &gate;
    dit_run* run = nullptr;
    ASSERT_EQ(dit_run_begin(model.get(), &request, &run), DIT_OK) << dit_last_message();
    std::thread first([&] {
        int more = 0;
        EXPECT_EQ(dit_run_step(run, &more), DIT_OK) << dit_last_message();
    });
    gate.inside.get_future().wait();
    int more = 0;
    EXPECT_EQ(dit_run_step(run, &more), DIT_BUSY);
    EXPECT_STREQ(dit_last_message(), "another call on this run has not returned");
    EXPECT_EQ(dit_run_latents(run, numbers, std::size(numbers)), DIT_BUSY);
    gate.opened.set_value();
    first.join();
    EXPECT_EQ(dit_run_step(run, &more), DIT_OK);
    dit_run_free(run);
}

TEST_P(Model, ARunHoldsItsModel) {
    std::vector<float> expected(2 * NUMBERS), state(2 * NUMBERS);
    ASSERT_EQ(dit_model_generate_latents(model.get(), &request, expected.data(), expected.size()), DIT_OK);
    dit_run* run = nullptr;
    ASSERT_EQ(dit_run_begin(model.get(), &request, &run), DIT_OK) << dit_last_message();
    EXPECT_EQ(dit_model_retain(model.get()), model.get());
    dit_model_release(model.get());
    model.reset();
    pipe.reset();
    for (int more = 1; more;) ASSERT_EQ(dit_run_step(run, &more), DIT_OK) << dit_last_message();
    EXPECT_EQ(dit_run_latents(run, state.data(), state.size()), DIT_OK);
    EXPECT_EQ(state, expected);
    dit_run_free(run);
}

}  // namespace
