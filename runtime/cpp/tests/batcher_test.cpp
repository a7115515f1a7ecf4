// The batcher on the tests' bundle: mixed requests get the bits that they get alone, and no request hurts another.
#include "batcher.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <random>
#include <thread>

#include "bundle.hpp"
#include "errors.hpp"
#include "pipeline.hpp"

namespace dit_runtime {
namespace {

std::vector<Request> mixed(const Manifest& manifest, std::size_t count, std::int64_t most_steps) {
    std::mt19937 choose(0);
    const auto of = [&](auto list) { return list.begin()[choose() % list.size()]; };
    std::vector<Request> requests;
    for (std::size_t number = 0; number < count; ++number) {
        Request request;
        request.labels = {static_cast<std::int64_t>(choose()) % manifest.classes()};
        request.seeds = {choose()};
        request.steps = 5 + static_cast<std::int64_t>(choose()) % (most_steps - 4);
        request.solver = of(std::initializer_list<const char*>{"", "ddim", "dpm++", "dpm++3", "unipc", "deis"});
        request.guidance = {of(std::initializer_list<float>{1, 1.5, 4, 8})};
        if (number % 5 == 0) request.cache = "taylorseer";
        if (number % 7 == 0) request.guidance_interval = {0.2, 0.8};
        if (number % 4 == 0) request.guidance_policy = "apg";
        if (number % 6 == 0) request.labels.push_back(1), request.seeds = {1, 2};
        if (number % 8 == 0 && !manifest.presets.empty()) {
            const auto preset =
                std::next(manifest.presets.begin(), static_cast<std::ptrdiff_t>(number / 8 % manifest.presets.size()));
            Request quick;
            quick.labels = request.labels, quick.seeds = request.seeds;
            request = with_preset(manifest, quick, preset->first);
        }
        if (manifest.start() && number % 3 == 0) {
            request.image = Pictures{{1, 32, 32, 3}, std::vector<std::uint8_t>(32 * 32 * 3)};
            for (auto& byte : request.image->bytes) byte = static_cast<std::uint8_t>(choose());
            request.strength = 0.7;
            if (number % 2) request.mask = Pictures{{1, 32, 32}, std::vector<std::uint8_t>(32 * 32)};
            for (std::size_t place = 0; request.mask && place < 512; ++place) request.mask->bytes[place] = 255;
        }
        requests.push_back(std::move(request));
    }
    return requests;
}

Batcher::Settings of(std::size_t places) {
    Batcher::Settings settings;
    settings.places = places;
    return settings;
}

// Draws mixed requests together and alone, and compares their bits.
void compare(const std::string& bundle, std::size_t count, std::int64_t most_steps, std::size_t places) {
    Options options;
    options.threads = 1;
    Pipeline alone(bundle, options), pipe(bundle, options);
    Batcher batcher(pipe, of(places));
    const std::vector<Request> requests = mixed(pipe.manifest, count, most_steps);
    Batcher::Tickets tickets;
    std::size_t pictures = 0;
    for (const Request& request : requests) tickets.push_back(batcher.submit(request));
    for (std::size_t number = 0; number < requests.size(); ++number) {
        const Drawn& drawn = tickets[number]->result();
        ASSERT_EQ(drawn.pictures, alone.images(requests[number])) << number;
        EXPECT_EQ(tickets[number]->done(), tickets[number]->evaluations());
        const Stats& stats = tickets[number]->stats();
        EXPECT_GE(stats.batch(), 1.0);
        EXPECT_GE(stats.total, stats.queue + stats.decode);
        pictures += tickets[number]->count();
    }
    const Batcher::Counts counts = batcher.counts();
    EXPECT_EQ(counts.drawn, pictures);
    EXPECT_GT(static_cast<double>(counts.samples), 1.5 * static_cast<double>(counts.calls));  // they did share calls
    EXPECT_EQ(counts.queued + counts.active, 0u);
    EXPECT_GT(counts.memo_hits, 0u);
}

TEST(Batcher, RunsThatStartFromPictures) { compare(PICTURED, 12, 12, 3); }

TEST(Batcher, MixedRequestsGetTheBitsThatTheyGetAlone) { compare(BUNDLE, 24, 20, 4); }

// With DIT_MIXED_BUNDLE, a bundle whose rows do not depend on their batch: pytest -m slow tests/cpp/test_server.py.
TEST(Batcher, TwoHundredMixedRequests) {
    const char* const bundle = std::getenv("DIT_MIXED_BUNDLE");
    if (!bundle) GTEST_SKIP();
    compare(bundle, 200, 50, 8);
}

// The step stage's engine, which the test watches and holds; it fails for calls with a sample whose first number is
// `poison`.
class Watched : public Engine {
  public:
    explicit Watched(std::unique_ptr<Engine> own) : own_(std::move(own)) {
        inputs = own_->inputs, outputs = own_->outputs;
    }

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        std::unique_lock<std::mutex> lock(mutex_);
        ++begun;
        for (const Input& input : arrays)
            if (input.name == "latents") batches.push_back(static_cast<std::size_t>(input.shape[0]));
        turn_.notify_all();
        turn_.wait(lock, [&] { return allowed > 0; });
        --allowed;
        for (const Input& input : arrays) {
            const auto* const values = static_cast<const float*>(input.data);
            const std::size_t size = count(input.shape), row = size / static_cast<std::size_t>(input.shape[0]);
            for (std::size_t first = 0; input.name == "latents" && first < size; first += row)
                if (values[first] == POISON) throw EngineError("poisoned");
        }
        return own_->run(arrays);
    }

    void allow(int calls) {
        const std::lock_guard<std::mutex> lock(mutex_);
        allowed += calls;
        turn_.notify_all();
    }
    // Waits until so many calls have begun.
    void await(std::size_t calls) {
        std::unique_lock<std::mutex> lock(mutex_);
        turn_.wait(lock, [&] { return begun >= calls; });
    }

    static constexpr float POISON = 12345.0f;
    std::size_t begun = 0;
    std::vector<std::size_t> batches;
    int allowed = 0;

  private:
    std::unique_ptr<Engine> own_;
    std::mutex mutex_;
    std::condition_variable turn_;
};

}  // namespace

struct EngineDouble {
    static Watched& watch(Pipeline& pipe) {
        std::unique_ptr<Engine>& engine = pipe.opened_->engines.at("denoiser");
        auto watched = std::make_unique<Watched>(std::move(engine));
        Watched& it = *watched;
        engine = std::move(watched);
        return it;
    }
};

namespace {

Request request(std::int64_t steps = 4, std::uint64_t seed = 0) {
    Request made;
    made.labels = {1};
    made.steps = steps;
    made.seeds = {seed};
    return made;
}

// A batcher whose first call of the step stage after its measurements waits for the test.
struct Held {
    explicit Held(std::size_t places = 4, Clock clock = now) {
        Batcher::Settings settings;
        settings.places = places;
        settings.clock = std::move(clock);
        batcher = std::make_unique<Batcher>(pipe, settings);
        watched = &EngineDouble::watch(pipe);
    }
    ~Held() { watched->allow(100000); }

    Pipeline pipe{BUNDLE, {}};
    std::unique_ptr<Batcher> batcher;
    Watched* watched;
};

TEST(Batcher, RequestsJoinBetweenTwoCalls) {
    Held held;
    const auto first = held.batcher->submit(request());
    held.watched->await(1);
    const auto second = held.batcher->submit(request(3, 1));
    held.watched->allow(100);
    first->result(), second->result();
    EXPECT_EQ(held.watched->batches, (std::vector<std::size_t>{1, 2, 2, 2}));
    EXPECT_EQ(first->stats().calls, 4u);
    EXPECT_EQ(first->stats().batched, 7u);
}

TEST(Batcher, ACancelledRequestLeavesWithinOneStep) {
    Held held;
    bool ended = false;
    Batcher::Submission submission;
    submission.ended = [&] { ended = true; };
    const auto gone = held.batcher->submit(request(1000), submission);
    const auto stays = held.batcher->submit(request(6, 1));
    held.watched->await(1);
    held.watched->allow(2);
    held.watched->await(3);
    gone->cancel();
    held.watched->allow(5000);
    EXPECT_THROW(gone->result(), Stopped);
    EXPECT_LE(gone->done(), 3);
    EXPECT_EQ(stays->result().pictures, Pipeline(BUNDLE, {}).images(request(6, 1)));
    EXPECT_TRUE(ended);
    EXPECT_EQ(held.batcher->counts().cancelled, 1u);
    EXPECT_EQ(held.batcher->counts().active, 0u);
}

TEST(Batcher, AFailureHurtsNoNeighbour) {
    Held held;
    Request poisoned = request(5, 1);
    poisoned.latents.emplace(count(held.pipe.manifest.state().shape), 0.0f);
    (*poisoned.latents)[0] = Watched::POISON;
    const auto first = held.batcher->submit(request(5, 2));
    held.watched->await(1);
    const auto bad = held.batcher->submit(poisoned), last = held.batcher->submit(request(5, 3));
    held.watched->allow(100);
    EXPECT_THROW(bad->result(), EngineError);
    Pipeline alone(BUNDLE, {});
    EXPECT_EQ(first->result().pictures, alone.images(request(5, 2)));
    EXPECT_EQ(last->result().pictures, alone.images(request(5, 3)));
    EXPECT_EQ(held.batcher->counts().failed, 1u);
    EXPECT_TRUE(held.batcher->alive());
}

TEST(Batcher, DeadlinesRefuseAndEndRequests) {
    std::atomic<double> seconds{0};
    Held held(4, [&] { return seconds.load(); });
    Batcher::Submission due;
    due.deadline = 5.0;
    const auto late = held.batcher->submit(request(500), due);
    held.watched->await(1);
    seconds = 0.5;  // so long takes a step
    held.watched->allow(1);
    held.watched->await(2);
    EXPECT_GT(held.batcher->lateness(5.0), 0.0);
    EXPECT_THROW(held.batcher->submit(request(500), due), Overloaded);
    const auto patient = held.batcher->submit(request(2));
    seconds = 5.5;
    held.watched->allow(100000);
    EXPECT_THROW(late->result(), Late);
    EXPECT_FALSE(patient->result().pictures.empty());
    const Batcher::Counts counts = held.batcher->counts();
    EXPECT_EQ(std::make_pair(counts.refused, counts.late), std::make_pair(std::size_t{1}, std::size_t{1}));
}

TEST(Batcher, ClosingFinishesOrStopsWhatIsInLine) {
    for (const bool drain : {true, false}) {
        Held held;
        const auto ticket = held.batcher->submit(request(50));
        held.watched->await(1);
        std::thread closing([&] { held.batcher->close(drain); });
        while (true) {
            try {
                held.batcher->submit(request())->cancel();
            } catch (const Closed&) {
                break;
            }
        }
        held.watched->allow(1000);
        closing.join();
        if (drain)
            EXPECT_FALSE(ticket->result().pictures.empty());
        else
            EXPECT_THROW(ticket->result(), Stopped);
        EXPECT_FALSE(held.batcher->alive());
    }
}

TEST(Batcher, ABadRequestIsRefusedBeforeItIsInLine) {
    Pipeline pipe(BUNDLE, {});
    Batcher batcher(pipe, of(2));
    EXPECT_THROW(batcher.submit({}), UsageError);
    EXPECT_THROW(batcher.submit(request(-1)), UsageError);
    Batcher::Submission latents;
    latents.latents = true;
    EXPECT_EQ(batcher.submit(request(), latents)->result().latents, pipe.latents(request()));
}

TEST(Batcher, EachSizeHasCallsOfItsOwn) {
    Pipeline pipe(SIZES, {}), alone(SIZES, {});
    Batcher batcher(pipe, of(4));
    std::vector<Request> requests;
    for (std::uint64_t seed = 0; seed < 6; ++seed) {
        requests.push_back(request(4, seed));
        requests.back().size = seed % 2 ? "32x64" : "";
    }
    Batcher::Tickets tickets;
    for (const Request& each : requests) tickets.push_back(batcher.submit(each));
    for (std::size_t number = 0; number < requests.size(); ++number)
        EXPECT_EQ(tickets[number]->result().pictures, alone.images(requests[number]));
}

TEST(Rows, TheKneeOfACurve) {
    EXPECT_EQ(knee({{1, 1.0}, {2, 2.0}, {4, 4.0}}), 1u);
    EXPECT_EQ(knee({{1, 1.0}, {2, 1.2}, {4, 1.8}, {8, 3.5}}), 4u);
    EXPECT_EQ(sizes(6), (std::vector<std::size_t>{1, 2, 4, 6}));
    EXPECT_EQ(sizes(8), (std::vector<std::size_t>{1, 2, 4, 8}));
}

TEST(SharedMemo, ComputesARowOnceAndForgetsTheOldest) {
    Stage stage;
    stage.name = "conditioner";
    stage.gives = {{"rows", "float32", {"rows", std::int64_t{2}}}};
    std::vector<std::size_t> calls;
    SharedMemo memo(
        [&](const Stage&, const std::vector<Input>& inputs, std::size_t rows) {
            calls.push_back(rows);
            std::vector<float> values;
            const auto* const labels = static_cast<const std::int64_t*>(inputs.at(0).data);
            for (std::size_t row = 0; row < rows; ++row)
                values.insert(values.end(), {static_cast<float>(labels[row]), 0.5f});
            return std::map<std::string, std::vector<float>>{{"rows", values}};
        },
        3 * 2 * sizeof(float));
    const auto rows = [&](std::vector<std::int64_t> labels) {
        return memo(stage, {{"labels", {static_cast<std::int64_t>(labels.size())}, labels.data(), true}}, labels.size())
            .at("rows");
    };
    const auto ask = [&](const std::vector<std::int64_t>& labels) {
        std::vector<float> values;
        for (const SharedRow& row : rows(labels)) values.insert(values.end(), row.get(), row.get() + 2);
        return values;
    };
    EXPECT_EQ(ask({4, 5, 4}), (std::vector<float>{4, 0.5f, 5, 0.5f, 4, 0.5f}));
    const SharedRow kept = rows({4}).front();
    EXPECT_EQ(kept, rows({4}).front());  // no copy
    EXPECT_EQ(ask({5, 6}), (std::vector<float>{5, 0.5f, 6, 0.5f}));
    EXPECT_EQ(ask({7}).front(), 7.0f);  // 4 is forgotten here, and stays with its holder
    EXPECT_EQ(*kept, 4.0f);
    EXPECT_EQ(ask({5, 6, 7}).front(), 5.0f);
    EXPECT_EQ(calls, (std::vector<std::size_t>{2, 1, 1}));
    EXPECT_EQ(ask({4}).front(), 4.0f);
    EXPECT_EQ(calls.size(), 4u);
    EXPECT_LE(memo.bytes(), 3 * 2 * sizeof(float));
}

}  // namespace
}  // namespace dit_runtime
