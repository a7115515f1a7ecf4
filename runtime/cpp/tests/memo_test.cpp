// The memo and its budget, and the stages that fill it.
#include "memo.hpp"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "bundle.hpp"
#include "errors.hpp"
#include "pipeline.hpp"
#include "reference.hpp"

namespace dit_runtime {
namespace {

using Floats = std::vector<float>;

constexpr std::size_t ROW = 6;

Rows labelled(const std::vector<std::int64_t>& labels) {
    if (labels.empty()) return {};
    return {labels.size(), {{"labels", {{static_cast<std::int64_t>(labels.size())}, {}, labels}}}};
}

// A network whose one stage before the loop runs once for each (t, label).
Manifest pairs(std::int64_t max_batch = 8) {
    Manifest manifest;
    manifest.ports = {
        {"x", "state", "float32", {1}}, {"t", "time", "float32", {}}, {"labels", "condition", "int64", {}, 100}};
    Stage conditioner, denoiser;
    conditioner.name = "conditioner", conditioner.runs = "time+condition", conditioner.max_batch = max_batch;
    conditioner.reads = {{"t", "float32", {"rows"}}, {"labels", "int64", {"rows"}}};
    conditioner.gives = {{"rows", "float32", {"rows", std::int64_t{ROW}}}};
    denoiser.name = "denoiser", denoiser.runs = "step";
    denoiser.reads = {{"x", "float32", {"batch", std::int64_t{1}}},
                      {"rows", "float32", {"groups", "batch", std::int64_t{ROW}}}};
    manifest.stages = {conditioner, denoiser};
    return manifest;
}

struct Calls {
    std::vector<std::pair<float, std::int64_t>> pairs;
    std::size_t largest = 0, held = 0;
};

// Rows that tell which (t, label) they are for.
Calls run(std::size_t steps, const std::vector<std::int64_t>& labels, const std::vector<std::int64_t>& null,
          std::size_t budget) {
    Calls calls;
    const Manifest manifest = pairs();
    const RunStage conditioner = [&](const Stage&, const std::vector<Input>& inputs, std::size_t count) {
        const auto* times = static_cast<const float*>(inputs.at(0).data);
        const auto* ids = static_cast<const std::int64_t*>(inputs.at(1).data);
        calls.largest = std::max(calls.largest, count);
        Floats rows;
        for (std::size_t index = 0; index < count; ++index) {
            calls.pairs.emplace_back(times[index], ids[index]);
            for (std::size_t i = 0; i < ROW; ++i) rows.push_back(i % 2 ? static_cast<float>(ids[index]) : times[index]);
        }
        return std::map<std::string, Floats>{{"rows", rows}};
    };
    Array times;
    for (std::size_t step = 0; step < steps; ++step) times.push_back(static_cast<double>(10 * (steps - step)));
    Memo memo(manifest, conditioner, times, labelled(labels), labelled(null), budget);
    for (std::size_t step = 0; step < steps; ++step)
        for (std::size_t first = 0; first < labels.size(); first += 3) {  // as a batch is split
            const std::size_t last = std::min(first + 3, labels.size()), own = last - first;
            const std::size_t before = calls.pairs.size();
            const Tensor& tensor = memo(step, first, last).at("rows");
            const auto groups = static_cast<std::int64_t>(null.empty() ? 1 : 2);
            EXPECT_EQ(tensor.shape, (Shape{groups, static_cast<std::int64_t>(own), std::int64_t{ROW}}));
            for (std::size_t row = 0; row < tensor.floats.size() / ROW; ++row) {
                const std::size_t other = null.size() == 1 ? 0 : first + row - own;
                const std::int64_t expected = row < own ? labels[first + row] : null.at(other);
                EXPECT_EQ(tensor.floats[row * ROW], times[step]);
                EXPECT_EQ(tensor.floats[row * ROW + 1], static_cast<float>(expected));
            }
            calls.held = std::max(calls.held, (calls.pairs.size() - before) * ROW * sizeof(float));  // a whole window
        }
    return calls;
}

TEST(Memo, StaysWithinItsBudget) {
    for (const std::size_t count : {1, 5, 64})
        for (const bool guided : {true, false}) {
            std::vector<std::int64_t> labels;
            for (std::size_t label = 0; label < count; ++label) labels.push_back(static_cast<std::int64_t>(label));
            const std::size_t distinct = count + guided, budget = 4 * ROW * distinct * 3 + 5;  // three steps and a bit
            const Calls calls =
                run(20, labels, guided ? std::vector<std::int64_t>{99} : std::vector<std::int64_t>(), budget);
            EXPECT_LE(calls.held, budget);
            EXPECT_EQ(calls.pairs.size(), 20 * distinct);  // each pair once: nothing is made again or in vain
            EXPECT_EQ(std::set(calls.pairs.begin(), calls.pairs.end()).size(), 20 * distinct);
            EXPECT_LE(calls.largest, 8u);
        }
}

TEST(Memo, AStepLargerThanTheBudgetIsStillMade) {
    const Calls calls = run(4, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, {99}, 1);
    EXPECT_EQ(calls.held, 11 * ROW * 4);
    EXPECT_EQ(calls.pairs.size(), 44u);
}

TEST(Memo, EqualRowsAreMadeOnce) {
    EXPECT_EQ(run(6, {3, 3, 7, 3, 7, 99}, {99}, 1000000).pairs.size(), 18u);
    EXPECT_EQ(run(6, {3, 3, 7}, {7, 8, 7}, 1000000).pairs.size(), 18u);  // a negative each
}

// An engine fails in the second part of a window: the same step again asks it anew.
TEST(Memo, AStepCanBeTriedAgain) {
    const Manifest manifest = pairs(1);
    int calls = 0;
    const RunStage fails_once = [&](const Stage&, const std::vector<Input>& inputs, std::size_t) {
        if (++calls == 2) throw EngineError("busy");
        const auto label = static_cast<float>(*static_cast<const std::int64_t*>(inputs.at(1).data));
        return std::map<std::string, Floats>{{"rows", Floats(ROW, label)}};
    };
    Memo memo(manifest, fails_once, {2, 1}, labelled({7, 3}));
    EXPECT_THROW(memo(0, 0, 2), EngineError);
    for (const std::size_t step : {std::size_t{0}, std::size_t{1}}) {
        Floats expected(ROW, 7.0f);
        expected.insert(expected.end(), ROW, 3.0f);
        EXPECT_EQ(memo(step, 0, 2).at("rows").floats, expected);
    }
    EXPECT_EQ(calls, 2 + 4);
}

// Four stages, of which two read what others give: each runs once for each distinct row of what it depends on.
TEST(Memo, EachStageOnceForWhatItDependsOn) {
    const Manifest manifest = read(WAVE);
    std::map<std::string, std::size_t> rows;
    std::map<std::string, std::vector<std::string>> read;
    const RunStage count_rows = [&](const Stage& stage, const std::vector<Input>& inputs, std::size_t count) {
        rows[stage.name] += count;
        EXPECT_LE(count, static_cast<std::size_t>(stage.max_batch));
        std::map<std::string, Floats> tensors;
        for (const Input& input : inputs) EXPECT_EQ(input.shape.at(0), static_cast<std::int64_t>(count)) << input.name;
        for (const TensorSpec& spec : stage.gives)
            tensors[spec.name].assign(count * dit_runtime::count(spec.row()), static_cast<float>(rows[stage.name]));
        return tensors;
    };
    // Four samples with two texts, and two sums of them; pooled is the same for the negative and one of them.
    Tensor words{{4, 3, 4}}, mask{{4, 3}, Floats(12, 1)}, pooled{{4, 5}};
    for (const float text : {1.0f, 2.0f, 1.0f, 2.0f}) words.floats.insert(words.floats.end(), 12, text);
    for (const float sum : {0.0f, 1.0f, 0.0f, 0.0f}) pooled.floats.insert(pooled.floats.end(), 5, sum);
    const Rows condition{4, {{"words", words}, {"words_mask", mask}, {"pooled", pooled}}};
    const Rows negative = null_condition(manifest.conditions(), manifest.null, {});
    const Array times = {30, 20, 20, 10};  // a solver that asks twice
    for (const std::size_t budget : {std::size_t{1}, MEMO_BYTES}) {
        rows.clear();
        Memo memo(manifest, count_rows, times, condition, negative, budget);
        const float* held = nullptr;
        for (std::size_t step = 0; step < times.size(); ++step) {
            const Arrays& inputs = memo(step, 0, 4);
            EXPECT_EQ(inputs.size(), 4u);
            EXPECT_EQ(inputs.at("words_mask").shape, (Shape{2, 4, 3}));
            EXPECT_EQ(inputs.at("context").shape, (Shape{2, 4, 3, 8}));
            EXPECT_EQ(inputs.at("modulation").shape, (Shape{2, 4, 8}));
            EXPECT_TRUE(!step || inputs.at("context").floats.data() == held);  // stacked once
            held = inputs.at("context").floats.data();
        }
        EXPECT_EQ(rows["context"], 3u);       // two texts and the negative
        EXPECT_EQ(rows["summary"], 4u);       // with their sums: (1, 0), (2, 1), (2, 0), the negative
        EXPECT_EQ(rows["modulation"], 3u);    // timesteps
        EXPECT_EQ(rows["conditioner"], 12u);  // of each, what the summary depends on
    }
    Memo memo(manifest, count_rows, times, condition, negative);
    EXPECT_EQ(memo(0, 1, 3, Groups::OWN).at("conditioning").shape, (Shape{1, 2, 2, 8}));
    EXPECT_EQ(memo(0, 1, 4, Groups::APART).at("conditioning").shape, (Shape{1, 3, 2, 8}));
    EXPECT_EQ(memo(0, 1, 3, Groups::NULLS).at("context").shape, (Shape{1, 2, 3, 8}));
    EXPECT_EQ(memo(0, 1, 3).at("context").shape, (Shape{2, 2, 3, 8}));
}

// A fingerprint of nothing is zero: here the step reads no tensor of the one stage before the loop.
TEST(Fingerprint, OfNoTensors) {
    const BundleCopy copy;
    copy.edit([](nlohmann::json& table) { stage(table, "denoiser")["reads"].erase(1); });
    Options options;
    options.low_memory = true;  // the denoiser, whose graph reads it, is not opened
    Pipeline pipe(copy.folder, options);
    EXPECT_EQ(fingerprint(pipe, labelled({1, 2, 3, 4}), 500), Floats(4 * FINGERPRINTS));
}

// Three rows at a time, more are refused: as many pairs as there are give what each gives alone.
TEST(Memo, AStageGetsNoMoreThanItTakes) {
    if (backends().empty()) GTEST_SKIP() << "this library has no engine";
    Pipeline pipe(BUNDLE, Options());
    const std::vector<std::int64_t> labels = {0, 1, 2, 3, 4, 5, 0};
    const Array times = {900, 700, 1};
    Memo together = pipe.memo(times, labelled(labels));
    for (std::size_t step = 0; step < times.size(); ++step) {
        Floats alone;
        for (const std::int64_t label : labels) {
            Memo memo = pipe.memo({times[step]}, labelled({label}));
            const Floats& rows = memo(0, 0, 1).at("conditioning").floats;
            alone.insert(alone.end(), rows.begin(), rows.end());
        }
        EXPECT_EQ(together(step, 0, labels.size()).at("conditioning").floats, alone);  // no sums, so to the bit
    }
}

}  // namespace
}  // namespace dit_runtime
