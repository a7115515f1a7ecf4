// What a manifest says of prompts and of guidance that a port takes, and what it may not say.
#include <gtest/gtest.h>

#include "changes.hpp"

namespace dit_runtime {
namespace {

using Json = nlohmann::json;

TEST(Prompts, OfAManifest) {
    const Manifest manifest = read(PROMPTED);
    ASSERT_EQ(manifest.prompts.size(), 2u);
    const Prompt &first = manifest.prompts[0], &second = manifest.prompts[1];
    EXPECT_EQ(first.ids + " " + first.mask + " " + first.tokenizer, "ids ids_mask tokenizer.json");
    EXPECT_EQ(first.prompt_template + ", " + first.negative_template, "a {}, no {}");
    EXPECT_TRUE(first.lowercase);
    EXPECT_EQ(second.mask + second.prompt_template + second.negative_template, "{}");
    EXPECT_EQ(second.tokens, 4);
    EXPECT_EQ(second.size, 5);
    EXPECT_FALSE(second.lowercase);
    EXPECT_EQ(manifest.prompt()->name, "text");
    EXPECT_EQ(read(BUNDLE).prompt(), nullptr);
    EXPECT_FALSE(manifest.prompt()->before_loop());
    EXPECT_TRUE(read(WAVE).prompts.empty());
}

TEST(Prompts, Refusals) {
    const auto bad = [](const char* words, const std::function<void(Json&)>& change) {
        refused_change(PROMPTED, words, change);
    };
    bad("prompts: got 0, expected one or more", [](Json& table) { table.erase("prompts"); });
    bad("prompts: got a table, expected a list", [](Json& table) { table["prompts"] = Json::object(); });
    bad("prompts: got 2, expected none", [](Json& table) { table["stages"].erase(0); });
    bad("unknown key 'colour'", [](Json& table) { table["prompts"][0]["colour"] = 1; });
    bad("'tokenizer' is missing", [](Json& table) { table["prompts"][0].erase("tokenizer"); });
    bad("prompt ids: tokens: got 0", [](Json& table) { table["prompts"][0]["tokens"] = 0; });
    bad("prompt ids: size: got 1048576000", [](Json& table) { table["prompts"][0]["size"] = 1000 << 20; });
    bad("lowercase: got 1, expected true or false", [](Json& table) { table["prompts"][0]["lowercase"] = 1; });
    for (const char* key : {"template", "negative"})
        for (const char* words : {"cat", "{} and {}"})
            bad((std::string(key) + ": got " + words + ", expected text with {} in one place").c_str(),
                [&](Json& table) { table["prompts"][0][key] = words; });
    bad("tokenizer_2.json has no size and sha256", [](Json& table) { table["files"].erase("tokenizer_2.json"); });
    bad("the first stage runs: got condition, expected prompt",
        [](Json& table) { std::swap(table["stages"][0], table["stages"][1]); });
    bad("stages that run 'prompt': got 2", [](Json& table) {
        table["stages"][1] = table["stages"][0];
        table["stages"][1]["name"] = "other";
    });
    bad("input of prompts 'ids' is listed", [](Json& table) { table["prompts"][1]["ids"] = "ids"; });
    bad("port or tensor 'rate' is listed", [](Json& table) {
        table["prompts"][1]["ids"] = "rate";
        stage(table, "text")["reads"][2]["name"] = "rate";
    });
    bad("stage text reads: got ids, ids_2, ids_mask, expected ids, ids_2",
        [](Json& table) { table["prompts"][0].erase("mask"); });
    bad("ids is: got int64 ['rows', 5], expected int64 ['rows', 6]",
        [](Json& table) { table["prompts"][0]["tokens"] = 6; });
    bad("ids_mask is: got float32", [](Json& table) { stage(table, "text")["reads"][1]["dtype"] = "float32"; });
    bad("stage text gives: got captains, expected a condition port",
        [](Json& table) { stage(table, "text")["gives"][0]["name"] = "captains"; });
    bad("stage text gives: got latents", [](Json& table) { stage(table, "text")["gives"][2]["name"] = "latents"; });
    bad("pooled is: got float32 ['rows', 7], expected float32 ['rows', 6]",
        [](Json& table) { stage(table, "text")["gives"][2]["shape"][1] = 7; });
    bad("stage text gives: got captions, expected both captions and mask, or none",
        [](Json& table) { stage(table, "text")["gives"].erase(1); });
    bad("stage text gives: got nothing", [](Json& table) { stage(table, "text")["gives"] = Json::array(); });
    for (const char* name : {"context", "guidance"})
        bad(text("port or tensor '", name, "' is listed").c_str(), [&](Json& table) {
            table["prompts"][1]["ids"] = name;
            stage(table, "text")["reads"][2]["name"] = name;
        });
    bad("null: pooled: got 0.0, expected none, for the text stage gives it",
        [](Json& table) { table["null"]["pooled"] = 0; });
    bad("null: mask: got 1.0, expected none", [](Json& table) { table["null"]["mask"] = 1; });
    bad("stage context (runs 'condition') reads: got ids",
        [](Json& table) { stage(table, "context")["reads"][0] = stage(table, "text")["reads"][0]; });
    changed_manifest(PROMPTED, [](Json& table) { stage(table, "text")["gives"].erase(2); });  // a request brings it
    changed_manifest(PROMPTED, [](Json& table) { table["prompts"][0].erase("negative"); });
}

TEST(Embedded, OfAManifest) {
    const Manifest manifest = read(EMBEDDED), mixed = read(PROMPTED);
    EXPECT_EQ(manifest.guidance.port, "strength");
    EXPECT_EQ(manifest.guidance.weight, 3.5);
    EXPECT_EQ(manifest.process.sampler.steps, 3);
    EXPECT_FALSE(manifest.mixes_guidance());
    EXPECT_TRUE(manifest.without_null().empty());
    EXPECT_TRUE(mixed.guidance.port.empty());
    EXPECT_EQ(mixed.guidance.weight, 4.0);
    EXPECT_EQ(mixed.process.sampler.steps, 25);
}

TEST(Embedded, Refusals) {
    const auto bad = [](const char* words, const std::function<void(Json&)>& change) {
        refused_change(EMBEDDED, words, change);
    };
    const char* const port = ", expected a condition port of float32 [] without a constant in null";
    bad((std::string("guidance: port: got strenght") + port).c_str(),
        [](Json& table) { table["guidance"]["port"] = "strenght"; });
    for (const char* name : {"timesteps", "latents", "labels"})
        bad((std::string("guidance: port: got ") + name + port).c_str(),
            [&](Json& table) { table["guidance"]["port"] = name; });
    bad((std::string("guidance: port: got strength") + port).c_str(),
        [](Json& table) { table["null"]["strength"] = 1.0; });
    bad("guidance: port: got null, expected a string", [](Json& table) { table["guidance"]["port"] = nullptr; });
    bad("guidance: default: got x", [](Json& table) { table["guidance"]["default"] = "x"; });
    bad("guidance: default: got 1e+300, expected a number of float32",
        [](Json& table) { table["guidance"]["default"] = 1e300; });
    bad("unknown key 'weight'", [](Json& table) { table["guidance"]["weight"] = 1; });
    bad("stage denoiser reads guidance: got guidance: port strength, expected one of the two", [](Json& table) {
        stage(table, "denoiser")["reads"].push_back({{"name", "guidance"}, {"dtype", "float32"}, {"shape", {"batch"}}});
    });
    for (const Json& steps : {Json(0), Json(1.5), Json(1 << 25)})
        bad("steps: got ", [&](Json& table) { table["process"]["sampler"]["steps"] = steps; });
}

}  // namespace
}  // namespace dit_runtime
