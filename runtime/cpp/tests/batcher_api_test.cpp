// batcher.h as a program sees it.
#include <dit/batcher.h>

#include <atomic>
#include <vector>

#include "api.hpp"

namespace {

struct Progress {
    std::atomic<int> steps{0}, ended{0};
};

class BatcherApi : public testing::Test {
  protected:
    void SetUp() override {
        ASSERT_EQ(dit_model_open(BUNDLE, nullptr, &model), DIT_OK) << dit_last_message();
        dit_batcher_options options = DIT_BATCHER_OPTIONS_INIT;
        options.places = 4;
        ASSERT_EQ(dit_batcher_new(model, &options, &batcher), DIT_OK) << dit_last_message();
    }
    void TearDown() override {
        dit_batcher_free(batcher);
        dit_model_release(model);
    }

    dit_request request(const std::int64_t& label, int steps) const {
        dit_request made = DIT_REQUEST_INIT;
        made.labels = &label;
        made.count = 1;
        made.steps = steps;
        return made;
    }

    dit_model* model = nullptr;
    dit_batcher* batcher = nullptr;
    static constexpr std::size_t SIZE = 32 * 32 * 3;
};

TEST_F(BatcherApi, DrawsTheModelsPictures) {
    const std::int64_t labels[] = {1, 2, 3};
    std::vector<dit_ticket*> tickets(3);
    Progress progress;
    dit_submission submission = DIT_SUBMISSION_INIT;
    submission.deadline = 600;
    submission.user = &progress;
    submission.on_event = [](int step, int, int ended, void* user) {
        auto& progress = *static_cast<Progress*>(user);
        ended ? ++progress.ended : progress.steps += step > 0;
    };
    for (std::size_t number = 0; number < 3; ++number) {
        const dit_request asked = request(labels[number], static_cast<int>(4 + number));
        ASSERT_EQ(dit_batcher_submit(batcher, &asked, &submission, &tickets[number]), DIT_OK) << dit_last_message();
    }
    for (std::size_t number = 0; number < 3; ++number) {
        const dit_request asked = request(labels[number], static_cast<int>(4 + number));
        std::vector<std::uint8_t> drawn(SIZE), expected(SIZE);
        int ended = 0;
        ASSERT_EQ(dit_ticket_wait(tickets[number], 60, &ended), DIT_OK);
        EXPECT_EQ(ended, 1);
        ASSERT_EQ(dit_ticket_result(tickets[number], drawn.data(), SIZE), DIT_OK) << dit_last_message();
        ASSERT_EQ(dit_model_generate(model, &asked, expected.data(), SIZE), DIT_OK);
        EXPECT_EQ(drawn, expected);
        EXPECT_EQ(dit_ticket_result(tickets[number], drawn.data(), SIZE - 1), DIT_BUFFER_TOO_SMALL);
        float latents[1];
        EXPECT_EQ(dit_ticket_latents(tickets[number], latents, 1), DIT_BAD_ARGUMENT);
        dit_ticket_stats stats = DIT_TICKET_STATS_INIT;
        ASSERT_EQ(dit_ticket_get_stats(tickets[number], &stats), DIT_OK);
        EXPECT_EQ(stats.step, stats.steps);
        EXPECT_EQ(stats.calls, 4u + number);
        EXPECT_GE(stats.batch, 1.0);
        dit_ticket_free(tickets[number]);
    }
    EXPECT_EQ(dit_batcher_close(batcher, 1), DIT_OK);  // all calls of on_event have returned
    EXPECT_EQ(progress.steps, 4 + 5 + 6);
    EXPECT_EQ(progress.ended, 3);
    dit_batcher_counts counts = DIT_BATCHER_COUNTS_INIT;
    ASSERT_EQ(dit_batcher_get_counts(batcher, &counts), DIT_OK);
    EXPECT_EQ(counts.drawn, 3u);
    EXPECT_EQ(counts.places, 4u);
}

TEST_F(BatcherApi, RefusesAndCancels) {
    const std::int64_t label = 1, wrong = 99;
    dit_ticket* ticket = nullptr;
    const dit_request bad = request(wrong, 4), asked = request(label, 1000);
    EXPECT_EQ(dit_batcher_submit(batcher, &bad, nullptr, &ticket), DIT_BAD_ARGUMENT);
    EXPECT_EQ(ticket, nullptr);
    dit_submission submission = DIT_SUBMISSION_INIT;
    submission.deadline = -1;
    EXPECT_EQ(dit_batcher_submit(batcher, &asked, &submission, &ticket), DIT_BAD_ARGUMENT);
    submission.deadline = 1e-9;
    EXPECT_EQ(dit_batcher_submit(batcher, &asked, &submission, &ticket), DIT_OVERLOADED) << dit_last_message();
    double late = -1;
    EXPECT_EQ(dit_batcher_lateness(batcher, 600, &late), DIT_OK);
    EXPECT_EQ(late, 0.0);
    ASSERT_EQ(dit_batcher_submit(batcher, &asked, nullptr, &ticket), DIT_OK);
    dit_ticket_cancel(ticket);
    std::uint8_t pixels[1];
    EXPECT_EQ(dit_ticket_result(ticket, pixels, 1), DIT_STOPPED);
    dit_ticket_free(ticket);
    EXPECT_EQ(dit_batcher_close(batcher, 0), DIT_OK);
    EXPECT_EQ(dit_batcher_submit(batcher, &asked, nullptr, &ticket), DIT_CLOSED);
    EXPECT_EQ(dit_batcher_new(nullptr, nullptr, nullptr), DIT_BAD_ARGUMENT);
    EXPECT_EQ(dit_ticket_wait(nullptr, 0, nullptr), DIT_BAD_ARGUMENT);
    dit_ticket_free(nullptr);
    dit_batcher_free(nullptr);
}

}  // namespace
