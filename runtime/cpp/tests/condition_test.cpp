// Conditions that fit a bundle's ports, and the negative of guidance.
#include "condition.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "errors.hpp"
#include "request.hpp"

namespace dit_runtime {
namespace {

using Floats = std::vector<float>;

// Words of `tokens` of 4 numbers each, and pooled.
Arrays words(std::int64_t rows, std::int64_t tokens) {
    Tensor words{{rows, tokens, 4}}, pooled{{rows, 5}};
    for (std::size_t index = 0; index < count(words.shape); ++index)
        words.floats.push_back(static_cast<float>(index + 1));
    pooled.floats.assign(count(pooled.shape), 0.5f);
    return {{"words", words}, {"pooled", pooled}};
}

void refused(const std::string& sentence, const std::function<void()>& call) {
    try {
        call();
        ADD_FAILURE() << "not refused: " << sentence;
    } catch (const UsageError& error) {
        EXPECT_NE(std::string(error.what()).find(sentence), std::string::npos) << error.what();
    }
}

TEST(Condition, FewerTokensArePadded) {
    const Manifest manifest = read(WAVE);
    const Rows fitted = fit(manifest.conditions(), words(2, 2));
    EXPECT_EQ(fitted.rows, 2u);
    EXPECT_EQ(fitted.arrays.at("words").shape, (Shape{2, 3, 4}));
    EXPECT_EQ(fitted.arrays.at("words").floats,
              (Floats{1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 9, 10, 11, 12, 13, 14, 15, 16, 0, 0, 0, 0}));
    EXPECT_EQ(fitted.arrays.at("words_mask").floats, (Floats{1, 1, 0, 1, 1, 0}));
    EXPECT_EQ(fit(manifest.conditions(), words(1, 3)).arrays.at("words_mask").floats, (Floats{1, 1, 1}));
    Arrays masked = words(2, 2);
    masked["words_mask"] = {{2, 2}, {}, {1, 0, 1, 1}};  // integers fit a port of floats
    EXPECT_EQ(fit(manifest.conditions(), masked).arrays.at("words_mask").floats, (Floats{1, 0, 0, 1, 1, 0}));
}

TEST(Condition, AMaskOfEitherType) {
    Manifest manifest = read(WAVE);
    Port& mask = manifest.ports.at(3);
    mask.dtype = "int64", mask.size = 2;
    Arrays arrays = words(1, 2);
    arrays["words_mask"] = {{1, 2}, {0, 1}};
    EXPECT_EQ(fit(manifest.conditions(), arrays).arrays.at("words_mask").integers,
              (std::vector<std::int64_t>{0, 1, 0}));
    arrays["words_mask"].floats[1] = 0.5f;
    refused("of 0 and 1", [&] { fit(manifest.conditions(), arrays); });
}

TEST(Condition, Refusals) {
    const Manifest manifest = read(WAVE), labels = read(BUNDLE);
    const auto bad = [&](const char* sentence, const std::function<void(Arrays&)>& change) {
        Arrays arrays = words(2, 2);
        change(arrays);
        refused(sentence, [&] { fit(manifest.conditions(), arrays); });
    };
    bad("condition has the unknown port 'wrods' (did you mean \"words\"?); known: words, words_mask, pooled",
        [](Arrays& arrays) { arrays["wrods"] = arrays["words"]; });
    bad("condition lacks pooled; expected an array for each of", [](Arrays& arrays) { arrays.erase("pooled"); });
    bad("condition: words has shape [2, 4, 4]; expected [rows, up to 3, 4]",
        [](Arrays& arrays) { arrays["words"] = words(2, 4)["words"]; });
    bad("condition: pooled has shape [2, 4]; expected [rows, 5]",
        [](Arrays& arrays) { arrays["pooled"] = {{2, 4}, Floats(8)}; });
    bad("condition: numbers of rows differ: words 2, pooled 1",
        [](Arrays& arrays) { arrays["pooled"] = {{1, 5}, Floats(5)}; });
    bad("condition: words holds values that are not finite", [](Arrays& arrays) { arrays["words"].floats[3] = NAN; });
    for (const auto& mask :
         {Tensor{{2, 3}, Floats(6, 1)}, Tensor{{2, 2}, {1, 0.5f, 1, 1}}, Tensor{{2, 2}, {1, 1, 0, 0}}})
        bad("expected [2, 2] of 0 and 1, a 1 in every row", [&](Arrays& arrays) { arrays["words_mask"] = mask; });
    for (const std::int64_t value : {-1, 6})
        refused("condition: labels holds other values than the integers from 0 to 5",
                [&, value = value] { fit(labels.conditions(), {{"labels", {{1}, {}, {value}}}}); });
    refused("integers from 0 to 5", [&] { fit(labels.conditions(), {{"labels", {{1}, {1.0f}}}}); });
    EXPECT_EQ(fit(labels.conditions(), {{"labels", {{1}, {}, {5}}}}).rows,
              1u);  // the null label is a value like others
}

TEST(Condition, WhatGuidanceLeadsAwayFrom) {
    const Manifest manifest = read(WAVE), captioned = read(CAPTIONED), labels = read(BUNDLE);
    const Rows constants = null_condition(manifest.conditions(), manifest.null, {});
    EXPECT_EQ(constants.rows, 1u);
    EXPECT_EQ(constants.arrays.at("words").floats, Floats(12));
    EXPECT_EQ(constants.arrays.at("words_mask").floats, Floats(3, 1));
    EXPECT_EQ(null_condition(labels.conditions(), labels.null, {}).arrays.at("labels").integers,
              (std::vector<std::int64_t>{5}));
    Arrays half = words(2, 1);
    half.erase("pooled");
    const Rows mixed = null_condition(manifest.conditions(), manifest.null, half);  // the other port has a constant
    EXPECT_EQ(mixed.rows, 2u);
    EXPECT_EQ(mixed.arrays.at("pooled").floats, Floats(10));
    EXPECT_EQ(mixed.arrays.at("words_mask").floats, (Floats{1, 0, 0, 1, 0, 0}));
    refused("guidance needs a negative with captions",
            [&] { null_condition(captioned.conditions(), captioned.null, {}); });
    refused("negative: captions has shape",
            [&] { null_condition(captioned.conditions(), captioned.null, {{"captions", {{1, 5}, Floats(5)}}}); });
}

TEST(Condition, RowsThatAreEqualHaveOneNumber) {
    const Rows condition{4, {{"a", {{4}, {}, {7, 3, 7, 7}}}, {"b", {{4, 2}, {1, 2, 1, 2, 1, 2, 1, 3}}}}};
    using Numbers = std::vector<std::size_t>;
    EXPECT_EQ(unique_rows(condition, {}), (Numbers{0, 0, 0, 0}));
    EXPECT_EQ(unique_rows(condition, {"a"}), (Numbers{0, 1, 0, 0}));
    EXPECT_EQ(unique_rows(condition, {"b"}), (Numbers{0, 0, 0, 1}));
    EXPECT_EQ(unique_rows(condition, {"a", "b"}), (Numbers{0, 1, 0, 2}));
    EXPECT_EQ(slice(condition, 1, 3).arrays.at("b").floats, (Floats{1, 2, 1, 2}));
    EXPECT_EQ(stack(condition, slice(condition, 1, 3)).arrays.at("a").integers,
              (std::vector<std::int64_t>{7, 3, 7, 7, 3, 7}));
}

// A request is checked without an engine.
TEST(Requests, AreCheckedAgainstAManifest) {
    const Manifest labels = read(BUNDLE), wave = read(WAVE), unconditioned = read(FREE);
    Request request;
    request.labels = {1, 3};
    const Checked checked = check(labels, request);
    EXPECT_EQ(checked.condition.arrays.at("labels").integers, request.labels);
    EXPECT_EQ(checked.negative.rows, 1u);
    EXPECT_EQ(checked.timesteps.size(), 25u);
    request.guidance = {1};
    EXPECT_EQ(check(labels, request).negative.rows, 0u);
    refused("this bundle takes words, words_mask, pooled, and no labels", [&] { check(wave, request); });
    request.condition = {{"labels", {{2}, {}, {1, 2}}}};
    refused("got both labels and a condition with labels", [&] { check(labels, request); });
    request.labels.clear();
    EXPECT_EQ(check(labels, request).condition.rows, 2u);
    request.seeds = {1, 2, 3};
    refused("3 seeds", [&] { check(labels, request); });
    request.condition.clear();
    refused("no labels", [&] { check(labels, request); });
    EXPECT_EQ(check(unconditioned, request).condition.rows, 3u);  // one for each seed
    EXPECT_EQ(check(unconditioned, request).negative.rows, 0u);
    request.seeds = {1};
    request.count = 4;
    EXPECT_EQ(check(unconditioned, request).condition.rows, 4u);
    request.condition = words(2, 3);
    request.count = 0;
    request.negative = words(3, 1);
    refused("negative has 3 rows; expected one, or one for each of 2 samples", [&] { check(wave, request); });
    request.eta = 0.5;
    request.solver = "ddpm";
    request.negative.clear();
    refused("only ddim takes it", [&] { check(wave, request); });
    request.eta = 0;
    refused("needs a model that predicts its variance", [&] { check(wave, request); });
    EXPECT_EQ(check(labels,
                    [] {
                        Request learned;
                        learned.labels = {1};
                        learned.solver = "ddpm";
                        return learned;
                    }())
                  .solver,
              "ddpm");
}

}  // namespace
}  // namespace dit_runtime
