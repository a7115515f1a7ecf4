// The conditioning table and its budget, and the conditioner that fills it.
#include <gtest/gtest.h>

#include <set>

#include "conditioning.hpp"
#include "errors.hpp"
#include "pipeline.hpp"

namespace dit_runtime {
namespace {

using Pair = std::pair<float, std::int64_t>;
constexpr std::size_t ROW = 6;

struct Seen {
    std::vector<Pair> pairs;
    std::size_t largest = 0, held = 0;
};

// Rows that tell which (t, label) they are for.
Seen run(std::size_t steps, const std::vector<std::int64_t>& labels, std::optional<std::int64_t> null,
         std::size_t budget, std::size_t max_rows = 8) {
    Seen seen;
    const Conditioner conditioner = [&](const std::vector<float>& times, const std::vector<std::int64_t>& ids) {
        std::vector<float> rows;
        seen.largest = std::max(seen.largest, times.size());
        for (std::size_t index = 0; index < times.size(); ++index) {
            seen.pairs.emplace_back(times[index], ids[index]);
            for (std::size_t i = 0; i < ROW; ++i) rows.push_back(i % 2 ? static_cast<float>(ids[index]) : times[index]);
        }
        return rows;
    };
    Array times;
    for (std::size_t step = 0; step < steps; ++step) times.push_back(static_cast<double>(10 * (steps - step)));
    Table table(conditioner, times, labels, null, ROW, max_rows, budget);
    for (std::size_t step = 0; step < steps; ++step)
        for (std::size_t first = 0; first < labels.size(); first += 3) {  // as a batch is split
            const std::size_t last = std::min(first + 3, labels.size()), own = last - first;
            const std::vector<float> rows = table(step, first, last);
            EXPECT_EQ(rows.size(), own * ROW * (null ? 2 : 1));
            for (std::size_t row = 0; row < rows.size() / ROW; ++row) {
                const std::int64_t expected = row < own ? labels[first + row] : *null;
                EXPECT_EQ(rows[row * ROW], times[step]);
                EXPECT_EQ(rows[row * ROW + 1], static_cast<float>(expected));
            }
            seen.held = std::max(seen.held, table.held());
        }
    return seen;
}

TEST(Table, StaysWithinItsBudget) {
    for (const std::size_t count : {1, 5, 64})
        for (const bool guided : {true, false}) {
            std::vector<std::int64_t> labels;
            for (std::size_t label = 0; label < count; ++label) labels.push_back(static_cast<std::int64_t>(label));
            const std::size_t distinct = count + guided, budget = 4 * ROW * distinct * 3 + 5;  // three steps and a bit
            const Seen seen = run(20, labels, guided ? std::optional<std::int64_t>(99) : std::nullopt, budget);
            EXPECT_LE(seen.held, budget);
            EXPECT_EQ(seen.pairs.size(), 20 * distinct);  // each pair once: nothing is made again or in vain
            EXPECT_EQ(std::set<Pair>(seen.pairs.begin(), seen.pairs.end()).size(), 20 * distinct);
            EXPECT_LE(seen.largest, 8u);
        }
}

TEST(Table, AStepLargerThanTheBudgetIsStillMade) {
    const Seen seen = run(4, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 99, 1);
    EXPECT_EQ(seen.held, 11 * ROW * 4);
    EXPECT_EQ(seen.pairs.size(), 44u);
}

TEST(Table, EqualLabelsAreMadeOnce) { EXPECT_EQ(run(6, {3, 3, 7, 3, 7, 99}, 99, 1000000).pairs.size(), 18u); }

TEST(Table, AConditionerOfAnotherSizeIsAnError) {
    const Conditioner few = [](const std::vector<float>&, const std::vector<std::int64_t>&) {
        return std::vector<float>(1);
    };
    Table table(few, {1}, {0}, std::nullopt, ROW, 8);
    EXPECT_THROW(table(0, 0, 1), EngineError);
}

TEST(Conditioner, GetsNoMoreThanItTakes) {
    Pipeline pipe(BUNDLE, Options());  // 3 rows at a time, more are refused
    const std::vector<float> times = {900, 700, 500, 300, 100, 50, 1};
    const std::vector<std::int64_t> labels = {0, 1, 2, 3, 4, 5, 0};
    std::vector<float> one_by_one;
    for (std::size_t row = 0; row < times.size(); ++row)
        for (const float value : pipe.condition({times[row]}, {labels[row]})) one_by_one.push_back(value);
    EXPECT_EQ(pipe.condition(times, labels), one_by_one);  // no sums, so to the bit
}

}  // namespace
}  // namespace dit_runtime
