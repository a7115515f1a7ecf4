// Prompts as token ids and guidance that a port takes: what a request needs, and the memo of the prompt stage.
#include "prompts.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "errors.hpp"
#include "npy.hpp"
#include "pipeline.hpp"
#include "run.hpp"
#include "warming.hpp"

namespace dit_runtime {
namespace {

using Floats = std::vector<float>;
using Integers = std::vector<std::int64_t>;

// The arrays of reference.npz that begin with the words.
Arrays recorded(const std::string& words) {
    Arrays arrays;
    for (const auto& [name, array] : parse_npz(read_bytes(Path(PROMPTED) / "reference.npz")))
        if (name.rfind(words, 0) == 0) {
            Tensor& tensor = arrays[name.substr(words.size())];
            tensor.shape = array.shape;
            if (array.kind == "i8")
                tensor.integers = array.as<std::int64_t>();
            else
                tensor.floats = array.as<float>();
        }
    return arrays;
}

Arrays with_rate(Arrays arrays, float rate) {
    const std::size_t rows = arrays.begin()->second.rows();
    arrays["rate"] = {with_rows(rows, {}), Floats(rows, rate)};
    return arrays;
}

void refused(const std::string& sentence, const std::function<void()>& call) {
    try {
        call();
        ADD_FAILURE() << "not refused: " << sentence;
    } catch (const UsageError& error) {
        EXPECT_NE(std::string(error.what()).find(sentence), std::string::npos) << error.what();
    }
}

// Token ids in the place of the ports that they lead to, for a condition and for a negative.
TEST(Requests, OfTokenIds) {
    const Manifest manifest = read(PROMPTED);
    const Arrays ids = with_rate(recorded("prompt."), 1), ports = recorded("condition.");
    Request request;
    request.condition = ids;
    request.negative = recorded("null prompt.");
    Checked checked = check(manifest, request);
    EXPECT_EQ(checked.condition.arrays.size(), 4u);
    EXPECT_EQ(checked.condition.arrays.at("ids").integers, ids.at("ids").integers);
    EXPECT_EQ(checked.negative.arrays.at("rate").floats, Floats{0});  // the bundle's constant
    EXPECT_EQ(checked.negative.rows, 1u);
    EXPECT_EQ(checked.steps, 25);
    EXPECT_EQ(checked.weights, Floats(2, 4.0f));
    request.negative = recorded("null.");
    EXPECT_EQ(check(manifest, request).negative.arrays.count("ids"), 0u);  // a form of its own
    request.condition = ports;
    EXPECT_EQ(check(manifest, request).condition.arrays.count("ids"), 0u);

    const auto bad = [&](const char* sentence, const std::function<void(Request&)>& change) {
        Request other;
        other.condition = ids;
        other.negative = recorded("null prompt.");
        change(other);
        refused(sentence, [&] { check(manifest, other); });
    };
    bad("no prompt; pass its token ids as ids, ids_mask, ids_2", [](Request& other) { other.condition.clear(); });
    bad("condition lacks ids_2", [](Request& other) { other.condition.erase("ids_2"); });
    bad("condition lacks ids_mask", [](Request& other) { other.condition.erase("ids_mask"); });
    bad("condition lacks rate", [](Request& other) { other.condition.erase("rate"); });
    bad("condition has the unknown port 'pooled'; known: ids, ids_mask, ids_2, rate",
        [&](Request& other) { other.condition["pooled"] = ports.at("pooled"); });
    bad("condition: ids holds other values than the integers from 0 to 7",
        [](Request& other) { other.condition["ids"].integers[3] = 8; });
    bad("condition: ids_mask holds other values than the integers from 0 to 1",
        [](Request& other) { other.condition["ids_mask"].integers[3] = 2; });
    bad("condition: ids has shape [2, 4]; expected [rows, 5]",
        [](Request& other) { other.condition["ids"] = {{2, 4}, {}, Integers(8, 1)}; });
    bad("condition: numbers of rows differ: ids 2, ids_mask 2, ids_2 1, rate 2",
        [](Request& other) { other.condition["ids_2"] = {{1, 4}, {}, Integers(4, 1)}; });
    bad("guidance needs a negative with ids, ids_mask, ids_2, to lead away from; or pass guidance 1",
        [](Request& other) { other.negative.clear(); });
    bad("guidance needs a negative with ids_2", [](Request& other) { other.negative.erase("ids_2"); });
    Request alone;
    alone.condition = ids;
    alone.guidance = {1};
    EXPECT_EQ(check(manifest, alone).negative.rows, 0u);
}

// A request's own values win over the bundle's; the weight is a row of its port, and nothing is led away from.
TEST(Requests, OfEmbeddedGuidance) {
    const Manifest manifest = read(EMBEDDED);
    Request request;
    request.labels = {1, 3};
    Checked checked = check(manifest, request);
    EXPECT_EQ(checked.timesteps.size(), 3u);
    EXPECT_EQ(checked.condition.arrays.at("strength").floats, Floats(2, 3.5f));
    EXPECT_EQ(checked.negative.rows, 0u);
    request.guidance = {0.5f, 6};
    request.steps = 4;
    checked = check(manifest, request);
    EXPECT_EQ(checked.condition.arrays.at("strength").floats, (Floats{0.5f, 6}));  // 0.5 is not 1
    EXPECT_EQ(checked.timesteps.size(), 4u);
    request.condition["strength"] = {{2}, Floats{1, 2}};
    refused("got both guidance and a condition with strength: pass one of them", [&] { check(manifest, request); });
    request.guidance.clear();
    EXPECT_EQ(check(manifest, request).condition.arrays.at("strength").floats, (Floats{1, 2}));
    request.negative = {{"labels", {{1}, {}, {0}}}};
    refused("got a negative, but this bundle takes its guidance as strength, and no negative",
            [&] { check(manifest, request); });
}

// What the prompt stage is asked for, and outputs that say which ids they are of.
struct Encoder {
    std::vector<Integers> asked;  // by call: the first id of each row
    RunStage run = [this](const Stage& stage, const std::vector<Input>& inputs, std::size_t rows) {
        const auto* const ids = static_cast<const std::int64_t*>(inputs.at(0).data);
        asked.emplace_back();
        std::map<std::string, Floats> outputs;
        for (std::size_t row = 0; row < rows; ++row) {
            asked.back().push_back(ids[row * 5]);
            for (const TensorSpec& spec : stage.gives)
                outputs[spec.name].insert(outputs[spec.name].end(), count(spec.row()),
                                          static_cast<float>(ids[row * 5]));
        }
        return outputs;
    };
};

Rows prompts(const Integers& first) {
    Rows rows{first.size(), {}};
    const auto count = static_cast<std::int64_t>(first.size());
    Tensor &ids = rows.arrays["ids"] = {{count, 5}}, &mask = rows.arrays["ids_mask"] = {{count, 5}};
    Tensor& others = rows.arrays["ids_2"] = {{count, 4}};
    for (const std::int64_t id : first) {
        ids.integers.insert(ids.integers.end(), {id, 0, 0, 0, 0});
        mask.integers.insert(mask.integers.end(), {1, 0, 0, 0, 0});
        others.integers.insert(others.integers.end(), 4, 1);
    }
    return rows;
}

TEST(PromptMemo, EachDistinctPromptOnce) {
    const Manifest manifest = read(PROMPTED);  // three rows at a time
    Encoder encoder;
    PromptMemo memo;
    Rows rows = prompts({7, 2, 7, 3, 2, 4, 5});
    rows.arrays["rate"] = {{7}, Floats(7, 0.5f)};
    const Rows encoded = memo(manifest, encoder.run, rows);
    EXPECT_EQ(encoder.asked, (std::vector<Integers>{{7, 2, 3}, {4, 5}}));
    EXPECT_EQ(encoded.rows, 7u);
    EXPECT_EQ(encoded.arrays.size(), 4u);
    EXPECT_EQ(encoded.arrays.at("rate").floats, Floats(7, 0.5f));
    EXPECT_EQ(encoded.arrays.at("captions").shape, (Shape{7, 5, 3}));
    for (std::size_t row = 0; row < 7; ++row)
        EXPECT_EQ(encoded.arrays.at("pooled").floats[6 * row], Floats({7, 2, 7, 3, 2, 4, 5})[row]);
    memo(manifest, encoder.run, prompts({2, 6, 7}));
    EXPECT_EQ(encoder.asked.back(), Integers{6});  // the others are there
    Rows masked = prompts({2});
    masked.arrays["ids_mask"].integers[1] = 1;
    memo(manifest, encoder.run, masked);
    EXPECT_EQ(encoder.asked.back(), Integers{2});  // another mask is another prompt
    const Rows ports{1, {{"captions", {{1, 5, 3}, Floats(15)}}}};
    EXPECT_EQ(memo(manifest, encoder.run, ports).arrays.at("captions").floats, Floats(15));
    EXPECT_EQ(encoder.asked.size(), 4u);
}

TEST(PromptMemo, ForgetsTheOldestOverItsBudget) {
    const Manifest manifest = read(PROMPTED);
    Encoder encoder;
    PromptMemo memo(2 * 4 * (15 + 5 + 6));  // two prompts
    memo(manifest, encoder.run, prompts({1}));
    memo(manifest, encoder.run, prompts({2}));
    memo(manifest, encoder.run, prompts({1}));
    memo(manifest, encoder.run, prompts({3}));  // 2 is the oldest
    memo(manifest, encoder.run, prompts({1}));
    EXPECT_EQ(encoder.asked, (std::vector<Integers>{{1}, {2}, {3}}));
    memo(manifest, encoder.run, prompts({2}));
    EXPECT_EQ(encoder.asked.back(), Integers{2});
    const Rows many = memo(manifest, encoder.run, prompts({4, 5, 6, 7}));
    EXPECT_EQ(many.arrays.at("pooled").floats[18], 7.0f);
}

TEST(PromptMemo, RefusesWhatIsNotFinite) {
    const Manifest manifest = read(PROMPTED);
    int calls = 0;
    const RunStage broken = [&](const Stage& stage, const std::vector<Input>&, std::size_t rows) {
        std::map<std::string, Floats> outputs;
        for (const TensorSpec& spec : stage.gives)
            outputs[spec.name].assign(rows * count(spec.row()), calls ? 1.0f : NAN);
        ++calls;
        return outputs;
    };
    PromptMemo memo;
    EXPECT_THROW(memo(manifest, broken, prompts({1})), NotFinite);
    EXPECT_EQ(memo(manifest, broken, prompts({1})).arrays.at("pooled").floats, Floats(6, 1));  // asked again
}

// The reference's run by its token ids is its run by what the text stage made of them.
TEST(Pipeline, TokenIdsLeadToTheReference) {
    for (const bool low_memory : {false, true}) {
        Options options;
        options.threads = 1;
        options.low_memory = low_memory;
        Pipeline pipe(PROMPTED, options);
        const auto arrays = parse_npz(read_bytes(Path(PROMPTED) / "reference.npz"));
        Request request;
        request.condition = recorded("prompt.");
        request.condition["rate"] = recorded("condition.").at("rate");
        request.negative = recorded("null prompt.");
        request.guidance = arrays.at("guidance").as<float>();
        request.seeds = {11, 12};
        request.steps = 4;
        const Floats made = pipe.latents(request), states = arrays.at("latents").as<float>();
        const Floats expected(states.end() - static_cast<std::ptrdiff_t>(made.size()), states.end());
        ASSERT_EQ(made.size(), 2u * 32);
        for (std::size_t i = 0; i < made.size(); ++i) EXPECT_NEAR(made[i], expected[i], 1e-5);
        const auto apart = [&](const std::function<void(Request&)>& change) {
            Request other = request;
            change(other);
            const Floats state = pipe.latents(other);
            float most = 0;
            for (std::size_t i = 0; i < state.size(); ++i) most = std::max(most, std::abs(state[i] - expected[i]));
            return most;
        };
        EXPECT_GT(apart([](Request& other) { other.condition["ids"].integers[0] = 1; }), 1e-2);
        EXPECT_GT(apart([](Request& other) { other.condition["ids_mask"].integers[0] = 0; }), 1e-2);
        EXPECT_GT(apart([](Request& other) { other.condition["ids_2"].integers[7] = 4; }), 1e-2);
        EXPECT_GT(apart([](Request& other) { other.negative["ids_2"].integers[0] = 1; }), 1e-2);
        EXPECT_LT(apart([](Request& other) { other.condition = recorded("condition."); }), 1e-5);
        EXPECT_LT(apart([](Request& other) { other.negative = recorded("null."); }), 1e-5);
    }
}

TEST(Warming, RunsThePromptStage) {
    const Rows made = made_up(read(PROMPTED), 2);
    EXPECT_EQ(made.arrays.size(), 4u);
    EXPECT_EQ(made.arrays.at("ids").integers, (Integers{0, 1, 2, 3, 4, 5, 6, 7, 0, 1}));
    EXPECT_EQ(made.arrays.at("ids_mask").integers, Integers(10, 1));
    EXPECT_EQ(made_up(read(EMBEDDED), 2).arrays.count("strength"), 0u);
    Pipeline(PROMPTED, Options(), {1, 3});
    Pipeline(EMBEDDED, Options(), {2});
}

}  // namespace
}  // namespace dit_runtime
