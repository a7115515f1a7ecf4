// Guidance policies and output caches against goldens.json, which Python wrote.
#include <gtest/gtest.h>

#include <functional>
#include <numeric>

#include "errors.hpp"
#include "goldens.hpp"
#include "loops.hpp"

namespace dit_runtime {
namespace {

using Json = nlohmann::json;

constexpr std::size_t SIZE = 24, GUIDED = 8, ROW = 12;  // numbers of a run, guided ones of a sample, and all of it
const std::vector<float> WEIGHTS = {3, 2};
// Both mix in double and round to float, as a network's answers are; a sum in another order may round the other way.
constexpr double RTOL = 1e-6;

// + and × alone, as in goldens.py.
std::vector<float> respond(const std::vector<float>& x, double t) {
    std::vector<float> values;
    for (const float small : x) values.push_back(small * 0.5f + static_cast<float>(t * 0x1p-12));
    return values;
}

Prediction evaluate(const Array& state, double t, Groups groups) {
    const std::vector<float> x(state.begin(), state.end());
    std::vector<float> own = respond(x, t), away = respond(x, t / 2), variance;
    for (float& value : away) value *= 0.75f;
    for (const float small : x) variance.push_back(std::min(small * small * 0.0625f, 1.0f));
    if (groups == Groups::APART) {
        own.insert(own.end(), away.begin(), away.end());
        variance.insert(variance.end(), variance.begin(), variance.begin() + SIZE);
    } else if (groups == Groups::BOTH) {
        for (std::size_t i = 0; i < SIZE; ++i)
            if (i % ROW < GUIDED) own[i] = own[i] + (WEIGHTS[i / ROW] - 1) * (own[i] - away[i]);
    }
    return {own, variance};
}

using Change = std::function<void(Prediction&)>;

// A whole run, and the rows of each step.
std::pair<Array, std::vector<std::size_t>> run(const Json& golden, const Change& change = {}) {
    const Process process = process_from_json(goldens()["processes"][golden["process"].get<std::string>()]);
    const std::string solver = golden["solver"], words = golden.value("policy", "");
    const auto steps = golden["steps"].get<std::int64_t>();
    const Array times = plan(process, solver, steps);
    Interval interval;
    if (golden.contains("interval")) interval.emplace(golden["interval"][0], golden["interval"][1]);
    Mix mix;
    if (std::shared_ptr<Policy> policy = make_policy(words))
        mix = [policy](const std::vector<float>& both) { return policy->mix(both, WEIGHTS, GUIDED); };
    const Draw noise = draw({3}, 2);
    const std::vector<float> start = noise(SIZE);
    Trajectory trajectory(Solver(process, solver, steps, {start.begin(), start.end()}, noise), times,
                          plan_guidance(process, times, 1, true, interval, words), mix,
                          make_cache(golden.value("cache", ""), golden.value("settings", Settings()), steps, 1));
    std::vector<std::size_t> asked;
    while (trajectory.done() < trajectory.steps()) {
        const auto groups = trajectory.asks();
        asked.push_back(groups ? rows(*groups) : 0);
        if (!groups) {
            trajectory.tell();
            continue;
        }
        Prediction answer = evaluate(trajectory.state(), times[trajectory.done()], *groups);
        if (change) change(answer);
        trajectory.tell(answer);
    }
    const std::size_t total = std::accumulate(asked.begin(), asked.end(), std::size_t{0});
    EXPECT_EQ(trajectory.rows(), total);
    const auto planned = golden.value("cache", "") == "easycache" ? std::nullopt : std::optional(total);
    EXPECT_EQ(trajectory.planned_rows(), planned);
    EXPECT_FALSE(trajectory.asks());
    return {trajectory.state(), asked};
}

TEST(Trajectories, EveryPolicyAndCache) {
    for (const Json& golden : goldens()["trajectories"]) {
        SCOPED_TRACE(golden.dump());
        const auto [x, asked] = run(golden);
        EXPECT_EQ(asked, golden["rows"].get<std::vector<std::size_t>>());
        EXPECT_LE(apart(x, golden["x"].get<Array>()), RTOL);
    }
    EXPECT_GT(goldens()["trajectories"].size(), 40u);
}

// Predictions that are off by a ten-thousandth must show, with each of them.
TEST(Trajectories, APerturbationShows) {
    for (const Json& golden : goldens()["trajectories"]) {
        const auto more = [](Prediction& answer) {
            for (float& value : answer.prediction) value *= 1.0001f;
        };
        EXPECT_GT(apart(run(golden, more).first, golden["x"].get<Array>()), 10 * RTOL) << golden.dump();
    }
}

TEST(Trajectories, AnAnswerThatIsNotFinite) {
    for (const Json& golden : goldens()["trajectories"]) {
        if (!golden.contains("policy")) continue;
        bool spoiled = false;
        const auto spoil = [&](Prediction& answer) {
            if (!std::exchange(spoiled, true)) answer.prediction[5] = NAN;
        };
        EXPECT_THROW(run(golden, spoil), NotFinite) << golden.dump();
    }
}

template <typename Call>
std::string refusal(const Call& call) {
    try {
        call();
    } catch (const UsageError& error) {
        return error.what();
    }
    return "nothing";
}

TEST(Trajectories, RefusalsOfPolicies) {
    const auto refused = [](const std::string& words, Interval interval = {}) {
        return refusal([&] { plan_guidance(Process(), {500}, 1, true, interval, words); });
    };
    EXPECT_EQ(refused("agp"),
              "guidance_policy 'agp' is not known (did you mean \"apg\"?); known: constant, rescale, zero_star, apg");
    EXPECT_EQ(refused("apg share=1"), "guidance_policy apg has no 'share'; it takes eta, momentum, norm_threshold");
    EXPECT_NE(refused("constant eta=1").find("it takes no numbers"), std::string::npos);
    EXPECT_NE(refused("apg eta=x").find("eta is 'x'; expected a number"), std::string::npos);
    EXPECT_NE(refused("apg eta").find("eta is ''; expected a number"), std::string::npos);
    EXPECT_NE(refused("rescale guidance_rescale=2").find("from 0 to 1"), std::string::npos);
    EXPECT_NE(refused("zero_star zero_init_steps=0.5").find("is '0.5'; expected an integer"), std::string::npos);
    EXPECT_NE(refused("zero_star zero_init_steps=1").find("predicts a velocity"), std::string::npos);
    EXPECT_EQ(refused("", {{0.7, 0.2}}),
              "guidance_interval is (0.7, 0.2); expected two fractions of the time, low <= high");
    EXPECT_NE(refused("", {{0, 1.5}}), "nothing");
    EXPECT_NE(refused("", {{0, NAN}}), "nothing");
    EXPECT_EQ(refused("zero_star", {{0, 1}}), "nothing");
}

TEST(Trajectories, RefusalsOfCaches) {
    const auto refused = [](const std::string& name, const Settings& settings, std::int64_t evaluations = 1) {
        return refusal([&] { make_cache(name, settings, 10, evaluations); });
    };
    EXPECT_EQ(refused("taylor", {}),
              "cache 'taylor' is not known (did you mean \"taylorseer\"?); known: taylorseer, easycache");
    EXPECT_EQ(refused("", {{"max_order", 1}}), "got max_order without a cache; known: taylorseer, easycache");
    EXPECT_NE(refused("easycache", {{"max_order", 1}}).find("has no max_order; it takes"), std::string::npos);
    EXPECT_EQ(refused("taylorseer", {{"max_order", 3}}), "max_order is 3; expected an integer from 0 to 2");
    EXPECT_EQ(refused("taylorseer", {{"cache_interval", 0}}), "cache_interval is 0; expected an integer of 1 or more");
    EXPECT_NE(refused("taylorseer", {{"disable_cache_before_step", -1}}), "nothing");
    EXPECT_NE(refused("easycache", {{"cache_threshold", NAN}}).find("expected a number of 0 or more"),
              std::string::npos);
    EXPECT_NE(refused("taylorseer", {}, 2).find("2 evaluations a step"), std::string::npos);
    EXPECT_EQ(refused("taylorseer", {{"disable_cache_after_step", -3}}), "nothing");
}

}  // namespace
}  // namespace dit_runtime
