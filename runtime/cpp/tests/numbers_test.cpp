// Schedule, solvers and noise against goldens.json, which Python wrote.
#include <gtest/gtest.h>

#include <dit/dit.h>

#include <functional>

#include "curves.hpp"
#include "errors.hpp"
#include "facts.hpp"
#include "goldens.hpp"
#include "manifest.hpp"
#include "noise.hpp"
#include "solvers.hpp"
#include "verify.hpp"

namespace dit_runtime {
namespace {

using Json = nlohmann::json;

constexpr std::size_t SIZE = 24;  // numbers of a golden run, of two samples
// Both compute in double, in the same order; exp, log, sin and cos may differ by an ulp between maths libraries, and a
// run of 20 steps hands that on.
constexpr double RTOL = 1e-12;
// Noise is rounded to float: an ulp of values up to 5.
constexpr double NOISE_RTOL = 1e-7;

// Each language finds them from numbers of its own, by least squares; a state has 24 bits.
constexpr double MATRIX_RTOL = 1e-9;

using Denoise = std::function<Prediction(const Array& x, double t)>;

// A whole run with a network that is called.
Array solve(const Process& process, const std::string& solver, std::int64_t steps, Array x, const Draw& draw,
            const Denoise& denoise, double eta = 0.0, const std::string& spacing = "", std::size_t first = 0) {
    Solver run(process, solver, steps, std::move(x), draw, eta, spacing, first);
    while (run.asks()) run.send(denoise(run.x(), run.t()));
    return run.x();
}

Process process(const std::string& name) { return process_from_json(goldens()["processes"][name]); }

// + and × alone, as in goldens.py.
Prediction respond(const Array& x, double t) {
    Prediction output;
    for (const double value : x) {
        const float small = static_cast<float>(value);
        output.prediction.push_back(small * 0.5f + static_cast<float>(t * 0x1p-12));
        output.variance.push_back(std::min(small * small * 0.0625f, 1.0f));
    }
    return output;
}

Array ends(const Array& x) { return {x[0], x[1], x[2], x[SIZE - 3], x[SIZE - 2], x[SIZE - 1]}; }

Array run(const Json& golden, const Denoise& denoise) {
    const Draw noise = draw({3}, 2);
    const std::vector<float> start = noise(SIZE);
    return ends(solve(process(golden["process"]), golden["solver"], golden["steps"].get<std::int64_t>(),
                      {start.begin(), start.end()}, noise, denoise, golden["eta"], golden["spacing"],
                      golden.value("first", std::size_t{0})));
}

TEST(Schedule, Betas) {
    for (const auto& entry : goldens()["processes"].items()) {
        const Process made = process(entry.key());
        const Array betas = made.betas(), levels = made.alpha_bar();
        ASSERT_EQ(betas.size(), made.kind() == "flow" ? 0 : static_cast<std::size_t>(made.train_steps));
        Array some_betas, some_levels;
        for (std::size_t t = 0; t < betas.size(); t += 7)
            some_betas.push_back(betas[t]), some_levels.push_back(levels[t]);
        // Only the cosine schedule needs more than + - × ÷ √.
        const double tolerance = made.beta_schedule == "squaredcos_cap_v2" ? RTOL : 0;
        EXPECT_LE(apart(some_betas, goldens()["betas"][entry.key()].get<Array>()), tolerance) << entry.key();
        EXPECT_LE(apart(some_levels, goldens()["alpha_bar"][entry.key()].get<Array>()), tolerance) << entry.key();
    }
}

TEST(Schedule, EverySpacing) {
    for (const auto& entry : goldens()["every_step"].items())
        EXPECT_EQ(timesteps(process("defaults"), "ddim", 250, entry.key()),
                  entry.value().get<std::vector<std::int64_t>>())
            << entry.key();
}

TEST(Solvers, EveryGoldenRun) {
    int replayed = 0, refused = 0;
    for (const Json& golden : goldens()["runs"]) {
        SCOPED_TRACE(golden.dump());
        if (!golden.contains("x")) {
            EXPECT_THROW(run(golden, respond), UsageError);
            ++refused;
            continue;
        }
        if (golden.contains("times")) {
            const Array asked = plan(process(golden["process"]), golden["solver"], golden["steps"].get<std::int64_t>(),
                                     golden["spacing"]);
            EXPECT_EQ(asked, golden["times"].get<Array>());
        }
        if (golden.contains("levels")) {
            std::vector<Array> known;
            for (const Level& level : levels(process(golden["process"]), golden["solver"], 20, "", golden["first"]))
                known.push_back({level.time, level.alpha, level.sigma});
            ASSERT_EQ(known.size(), golden["levels"].size());
            for (std::size_t index = 0; index < known.size(); ++index)
                EXPECT_LE(apart(known[index], golden["levels"][index].get<Array>()), RTOL);
        }
        if (golden.contains("sigmas_after")) {
            Array after;
            for (const Step& step : make_schedule(process(golden["process"]), golden["solver"],
                                                  golden["steps"].get<std::int64_t>(), golden["spacing"]))
                after.push_back(step.after.sigma);
            EXPECT_LE(apart(after, golden["sigmas_after"].get<Array>()), RTOL);
        }
        EXPECT_LE(apart(run(golden, respond), golden["x"].get<Array>()), RTOL);
        ++replayed;
    }
    EXPECT_GT(replayed, 200);
    EXPECT_GT(refused, 5);
}

TEST(Solvers, AsMatrices) {
    int linear_ones = 0, others = 0;
    for (const Json& golden : goldens()["matrices"]) {
        SCOPED_TRACE(golden.dump());
        const auto matrices = linear(process(golden["process"]), golden["solver"], 20, 0.0, "", golden["first"]);
        ASSERT_EQ(matrices.has_value(), !golden["matrices"].is_null());
        ++(matrices ? linear_ones : others);
        if (!matrices) continue;
        Array chosen;
        for (const Matrix& matrix : {matrices->at(0), matrices->at(1), matrices->back()})
            for (const auto& row : matrix) chosen.insert(chosen.end(), row.begin(), row.end());
        EXPECT_LE(apart(chosen, golden["matrices"].get<Array>()), MATRIX_RTOL);
    }
    EXPECT_GT(linear_ones, 50);
    EXPECT_GT(others, 50);
    EXPECT_FALSE(linear(process("defaults"), "ddim", 20, 0.7));  // it draws
}

// A run can be stepped from outside: it asks where the plan says, and stands still until an answer is sent.
TEST(Solvers, ARunIsStepped) {
    std::vector<std::pair<std::string, std::string>> cases;
    for (const std::string& solver : NOISE_SOLVERS) cases.emplace_back(solver, "defaults");
    for (const std::string& solver : FLOW_SOLVERS) cases.emplace_back(solver, "flow");
    for (const auto& [solver, name] : cases) {
        const Process made = process(name);
        const Array asked = plan(made, solver, 5);
        const Draw noise = draw({3}, 2);
        Solver run(made, solver, 5, Array(SIZE, 0.5), noise);
        for (const double t : asked) {
            ASSERT_TRUE(run.asks()) << solver;
            EXPECT_EQ(run.t(), t) << solver;
            const Array before = run.x();
            run.send(respond(before, t));
            EXPECT_NE(run.x(), before) << solver;
        }
        EXPECT_FALSE(run.asks()) << solver;
        const Array whole = solve(made, solver, 5, Array(SIZE, 0.5), draw({3}, 2), respond);
        EXPECT_EQ(run.x(), whole) << solver;
    }
}

// Predictions that are off by a millionth from the second on must show in every solver: the tolerance has teeth.
TEST(Solvers, APerturbationShows) {
    int tried = 0;
    for (const Json& golden : goldens()["runs"]) {
        const std::string name = golden["process"];
        const bool taken = name == "defaults" || name == "flow" || name == "discrete";
        if (!golden.contains("x") || !taken || golden["steps"] == 1) continue;
        int step = 0;
        const Denoise wrong = [&](const Array& x, double t) {
            Prediction output = respond(x, t);
            if (++step >= 2)
                for (float& value : output.prediction) value *= 1.000001f;
            return output;
        };
        EXPECT_GT(apart(run(golden, wrong), golden["x"].get<Array>()), 100 * RTOL) << golden.dump();
        ++tried;
    }
    EXPECT_GT(tried, 20);
}

TEST(Solvers, Refusals) {
    const auto with = [](const std::string& solver, std::int64_t steps, double eta, const std::string& spacing) {
        return solve(Process(), solver, steps, Array(SIZE), draw({0}, 1), respond, eta, spacing);
    };
    EXPECT_THROW(with("dpm+", 5, 0, ""), UsageError);
    EXPECT_THROW(with("ddim", 0, 0, ""), UsageError);
    EXPECT_THROW(with("ddim", -1, 0, ""), UsageError);
    EXPECT_THROW(with("ddim", 1001, 0, ""), UsageError);
    EXPECT_THROW(with("ddim", 5, 1.5, ""), UsageError);
    EXPECT_THROW(with("ddim", 5, NAN, ""), UsageError);
    EXPECT_THROW(with("ddpm", 5, 0.5, ""), UsageError);
    EXPECT_THROW(with("ddim", 5, 0, "evenly"), UsageError);
    EXPECT_THROW(with("euler", 5, 0, ""), UsageError);
    const Denoise silent = [](const Array& x, double t) { return Prediction{respond(x, t).prediction, {}}; };
    Solver run(Process(), "ddpm", 5, Array(SIZE, 0.5), draw({0}, 1));
    EXPECT_THROW(run.send(silent(run.x(), run.t())), UsageError);
    EXPECT_EQ(run.x(), Array(SIZE, 0.5));  // nothing is half done
    try {
        with("ddim", 300, 0, "stride");
        FAIL();
    } catch (const UsageError& error) {
        EXPECT_NE(std::string(error.what()).find("250 and 334"), std::string::npos) << error.what();
    }
}

// A flow takes its own solvers and spacings alone; the SDE's last step is one of its own.
TEST(Solvers, RefusalsOfAFlow) {
    const auto refused = [](const std::string& solver, std::int64_t steps, double eta, const std::string& spacing) {
        try {
            solve(process("flow"), solver, steps, Array(SIZE), draw({0}, 1), respond, eta, spacing);
        } catch (const UsageError& error) {
            return std::string(error.what());
        }
        return std::string("nothing");
    };
    for (const std::string solver : {"ddpm", "ddim"})
        EXPECT_NE(refused(solver, 5, 0, "").find("velocity; take one of dpm++1, dpm++, dpm++3, euler"),
                  std::string::npos);
    EXPECT_NE(refused("heun", 5, 0, "leading").find("take one of trailing, linspace, discrete, integer"),
              std::string::npos);
    EXPECT_NE(refused("sde", 5, 0, "trailing").find("its steps are even"), std::string::npos);
    EXPECT_NE(refused("sde", 1, 0, "").find("at least 2"), std::string::npos);
    EXPECT_NE(refused("euler", 1001, 0, "").find("1 to 1000"), std::string::npos);
    EXPECT_NE(refused("sde", 5, 0.5, "").find("only ddim"), std::string::npos);
    EXPECT_EQ(refused("sde", 2, 0, ""), "nothing");
}

// Every noise level is clipped away: nothing is left to visit.
TEST(Solvers, NothingUnclipped) {
    Process clipped;
    clipped.sampler.lambda_min_clipped = 100;
    for (const auto& spacing : SPACINGS) {
        if (contains(CURVES, spacing)) continue;  // they bend σ between the ends of all training steps
        EXPECT_THROW(timesteps(clipped, "dpm++", 1, spacing), UsageError) << spacing;
    }
}

TEST(Solvers, RefusalsOfLists) {
    const auto refused = [](const std::string& name, const std::string& solver, const std::string& spacing) {
        try {
            plan(process(name), solver, 2, spacing);
        } catch (const UsageError& error) {
            return std::string(error.what());
        }
        return std::string("nothing");
    };
    const auto has = [&](const std::string& said, const std::string& words) {
        EXPECT_NE(said.find(words), std::string::npos) << said;
    };
    for (const std::string list : {"640, 999", "640, 640", "640, x", "640, NaN", "640, true", "640, [1]", "6,1e999"})
        has(refused("defaults", "ddim", list), "expected a name, or falling times as in '999, 640, 300'");
    has(refused("defaults", "ddim", "9, " + std::string(100000, '[')), "expected a name, or falling times");
    has(refused("defaults", "ddim", "999, 640, 3"), "steps is 2; expected 3, for spacing lists so many times");
    for (const std::string list : {"1000, 640", "640.5, 0", "640, -1"})
        has(refused("defaults", "ddim", list), "expected training steps, from 999 down to 0");
    for (const std::string list : {"1.5, 0.5", "1, 0"})
        has(refused("flow", "euler", list), "expected σ of a flow, from 1 down to above 0");
    has(refused("flow", "euler", "0.5, 0.49999999999"), "two σ are the same in float32");
    has(refused("flow", "unipc", "1, 0.9999999"), "two σ are the same in float32");
    has(refused("flow", "sde", "1, 0.5"), "its steps are even");
    for (const std::string spacing : {"0.9, 0.5", "beta"})
        has(refused("integer", "euler", spacing), "this network reads σ before its shift, so take 'integer'");
    EXPECT_EQ(refused("flow", "euler", "0.9, 0.5"), "nothing");
    EXPECT_EQ(refused("defaults", "ddim", "640, 0"), "nothing");
}

// Its goldens are σ of the curve alone; here each quantile counts.
TEST(Curves, QuantilesOfBeta) {
    EXPECT_EQ(beta_quantile(0), 0);
    EXPECT_EQ(beta_quantile(1), 1);
    EXPECT_DOUBLE_EQ(beta_quantile(0.5), 0.5);
    for (const auto& [probability, expected] : goldens()["beta_quantiles"].items())
        EXPECT_NEAR(beta_quantile(std::stod(probability)) / expected.get<double>(), 1, 1e-14) << probability;
}

TEST(Noise, Streams) {
    for (const Json& golden : goldens()["noise"]) {
        Noise words(golden["seed"].get<std::uint64_t>());
        for (const Json& word : golden["bits"]) EXPECT_EQ(words.bits(), word.get<std::uint32_t>());
        Noise stream(golden["seed"].get<std::uint64_t>());
        for (const Json& draw : golden["draws"])
            EXPECT_LE(apart(stream.normal(draw["size"]), draw["values"].get<std::vector<float>>()), NOISE_RTOL);
        Noise shifted(golden["seed"].get<std::uint64_t>());
        shifted.bits();
        EXPECT_GT(apart(shifted.normal(64), golden["draws"][7]["values"].get<std::vector<float>>()), 0.1);
    }
}

TEST(Noise, OneSeedASample) {
    const auto seeds = goldens()["seeds"]["seeds"].get<std::vector<std::uint64_t>>();
    const Draw each = draw(seeds, seeds.size());
    for (const Json& golden : goldens()["seeds"]["draws"])
        EXPECT_LE(apart(each(golden.size()), golden.get<std::vector<float>>()), NOISE_RTOL);
    EXPECT_THROW(draw({1, 2}, 3), UsageError);
    EXPECT_THROW(draw({}, 3), UsageError);
}

// The public header cannot read facts.json.
TEST(Facts, RankOfTheHeader) {
    const dit_info info = DIT_INFO_INIT;
    const dit_port port = DIT_PORT_INIT;
    EXPECT_EQ(std::size(info.state_shape), static_cast<std::size_t>(limit("rank")));
    EXPECT_EQ(std::size(port.shape), static_cast<std::size_t>(limit("rank")));
}

TEST(Facts, EveryPrecisionHasTolerances) {
    EXPECT_EQ(TOLERANCES.size(), 5u);
    for (const auto& [backend, precisions] : facts().at("precisions").items())
        for (const auto& precision : precisions) EXPECT_EQ(TOLERANCES.count(precision), 1u) << backend;
    EXPECT_LT(TOLERANCES.at("fp32").prediction, TOLERANCES.at("bf16").prediction);
}

}  // namespace
}  // namespace dit_runtime
