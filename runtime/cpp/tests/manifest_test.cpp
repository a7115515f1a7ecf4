// Manifests and the files they name.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bundle.hpp"
#include "changes.hpp"
#include "checking.hpp"
#include "errors.hpp"
#include "manifest.hpp"

namespace dit_runtime {
namespace {

using Json = nlohmann::json;

void check_files(const Path& folder, const Manifest& manifest, const std::vector<std::string>& names) {
    CheckedFiles none;
    Checking(folder, manifest, names, none).finish();
}

class ManifestTest : public ::testing::Test {
  protected:
    // The bundle is refused with a sentence that holds these words.
    void refused(const std::vector<std::string>& words) {
        try {
            read(copy.folder);
            ADD_FAILURE() << "not refused";
        } catch (const BundleError& error) {
            for (const auto& word : words)
                EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
        }
    }

    BundleCopy copy;
};

TEST_F(ManifestTest, TheUntouchedCopyIsRead) {
    const Manifest manifest = read(copy.folder);
    EXPECT_EQ(manifest.classes(), 5);
    EXPECT_EQ(manifest.labels[3], "dog, hound");
    EXPECT_EQ(manifest.state().shape, (Shape{2, 4, 4}));
    EXPECT_EQ(manifest.time().name, "timesteps");
    EXPECT_EQ(manifest.conditions().size(), 1u);
    EXPECT_TRUE(manifest.mixes_guidance());
    EXPECT_EQ(manifest.step().max_batch, 3);
    EXPECT_EQ(manifest.image_shape(), (Shape{3, 32, 32}));
    for (const Stage& stage : manifest.stages) check_files(copy.folder, manifest, stage.files());
}

TEST_F(ManifestTest, BatchInvariant) {
    EXPECT_FALSE(read(copy.folder).batch_invariant);
    copy.edit([](Json& table) { table["batch_invariant"] = true; });
    EXPECT_TRUE(read(copy.folder).batch_invariant);
    copy.edit([](Json& table) { table["batch_invariant"] = 1; });
    refused({"batch_invariant"});
}

TEST_F(ManifestTest, Format) {
    for (const Json& format : {Json(3), Json(99), Json(UINT64_MAX)}) {
        copy.edit([&](Json& table) { table["format"] = format; });
        refused({"manifest.json", "expected 2", "upgrade"});
    }
    copy.edit([](Json& table) { table["format"] = 1; });
    refused({"format 1, expected 2: rebuild it with `dit-export build`"});
    for (const Json& format : {Json("2"), Json(nullptr), Json(1.5), Json(Json::array())}) {
        copy.edit([&](Json& table) { table["format"] = format; });
        refused({"no format number", "expected 2"});
    }
}

TEST_F(ManifestTest, NotJson) {
    for (const std::string content :
         {"", "{", "[]", "null", "\"a\"", "{\"format\": 2}", "\xef\xbb\xbf{}", "\xff\xfe\xfd"}) {
        copy.write("manifest.json", content);
        refused({"manifest.json"});
    }
    copy.write("manifest.json", std::string(100000, '['));
    refused({"not JSON"});
    std::filesystem::remove(copy.folder / "manifest.json");
    refused({"no manifest.json", "dit-export build"});
}

TEST_F(ManifestTest, UnknownKeys) {
    copy.edit([](Json& table) { table["fromat"] = 1; });
    refused({"unknown key 'fromat'", "did you mean \"format\""});
    copy.restore();
    copy.edit([](Json& table) { stage(table, "denoiser")["batch"] = 1; });
    refused({"unknown key 'batch'"});
    copy.restore();
    copy.edit([](Json& table) { table["process"]["sampler"]["clip"] = true; });
    refused({"sampler", "unknown key 'clip'"});
}

TEST(Ports, OfEachKind) {
    const auto same = [](Json&) {};
    const Manifest captioned = changed_manifest(CAPTIONED, same), wave = changed_manifest(WAVE, same);
    EXPECT_EQ(captioned.without_null(), (std::vector<std::string>{"captions"}));
    EXPECT_EQ(captioned.port("mask")->masks, "captions");
    EXPECT_EQ(captioned.classes(), 0);
    EXPECT_EQ(wave.state().shape, Shape{6});
    EXPECT_TRUE(wave.without_null().empty());
    EXPECT_EQ(wave.end(), nullptr);
    EXPECT_EQ(changed_manifest(VIDEO, same).state().shape, (Shape{2, 3, 4, 4}));
    EXPECT_FALSE(changed_manifest(FREE, same).mixes_guidance());
}

TEST(Stages, AnEncoderNeedsADecoder) {
    refused_change(PICTURED, "stage encoder: got no stage that runs 'end', expected one", [](Json& table) {
        Json& stages = table["stages"];
        const auto decodes = [](const Json& stage) { return stage["runs"] == "end"; };
        stages.erase(std::find_if(stages.begin(), stages.end(), decodes));
    });
}

TEST(Ports, Refusals) {
    const auto bad = [](const char* words, const std::function<void(Json&)>& change) {
        refused_change(WAVE, words, change);
    };
    // signal, moment, words, words_mask, pooled
    bad("state ports: got 0", [](Json& table) { table["ports"].erase(0); });
    bad("state ports: got 2", [](Json& table) { table["ports"][4]["role"] = "state"; });
    bad("time ports: got 0", [](Json& table) { table["ports"][1]["role"] = "condition"; });
    bad("rank 1 or more", [](Json& table) { table["ports"][0]["shape"] = Json::array(); });
    bad("rank 0", [](Json& table) { table["ports"][1]["shape"] = {1}; });
    bad("at most 268435456 bytes", [](Json& table) { table["ports"][0]["shape"] = {5, 1 << 24}; });
    bad("at most 268435456 bytes",
        [](Json& table) { table["ports"][4].update({{"dtype", "int64"}, {"size", 2}, {"shape", {3, 1 << 24}}}); });
    bad("role: got prompt", [](Json& table) { table["ports"][4]["role"] = "prompt"; });
    bad("dtype: got float16", [](Json& table) { table["ports"][4]["dtype"] = "float16"; });
    bad("size: got 0, expected 1 or more", [](Json& table) { table["ports"][4]["dtype"] = "int64"; });
    bad("size: got 3, expected 0", [](Json& table) { table["ports"][4]["size"] = 3; });
    bad("port or tensor 'words'", [](Json& table) { table["ports"][3]["name"] = "words"; });
    for (const std::string& name : RESERVED)
        bad(("a port is called '" + name + "'").c_str(), [&](Json& table) { table["ports"][3]["name"] = name; });
    bad("no mask", [](Json& table) { table["ports"][3]["masks"] = "wrods"; });
    bad("no mask", [](Json& table) { table["ports"][2]["masks"] = "words_mask"; });
    bad("no mask", [](Json& table) { table["ports"][0]["masks"] = "words"; });
    bad("got [3], expected [5]", [](Json& table) { table["ports"][3]["masks"] = "pooled"; });
    bad("masked port 'words'", [](Json& table) {
        table["ports"][4] = table["ports"][3];
        table["ports"][4]["name"] = "pooled";
    });
    bad("port of a picture: pooled: got condition float32 [5], expected a condition port of float32 [6]",
        [](Json& table) { table["ports"][4]["picture"] = true; });
    bad("port of a picture: signal: got state float32 [6]", [](Json& table) { table["ports"][0]["picture"] = true; });
    bad("ports of a picture: got words, pooled, expected one at most", [](Json& table) {
        for (int port : {2, 4}) {
            table["ports"][port]["picture"] = true;
            table["ports"][port]["shape"] = {6};
        }
        table["ports"].erase(3);
    });
    bad("at most", [](Json& table) { table["ports"][4]["shape"] = {1 << 20, 1 << 20}; });
    bad("at most", [](Json& table) { table["ports"][4]["shape"] = {1, 1, 1, 1, 1, 1, 1, 1, 1}; });
    bad("null: got moment", [](Json& table) { table["null"]["moment"] = 0; });
    bad("channels: got 7, expected 1 to 6", [](Json& table) { table["guidance"]["channels"] = 7; });
    bad("labels: got 1 names, expected 0", [](Json& table) { table["labels"] = {"ant"}; });
    bad("null: words_mask: got 0.0, expected 1", [](Json& table) { table["null"]["words_mask"] = 0; });
    bad("null: pooled: got 1e+300, expected a number of float32", [](Json& table) { table["null"]["pooled"] = 1e300; });
    bad("size: got 1, expected 2 or more", [](Json& table) {
        table["ports"][3]["dtype"] = "int64";
        table["ports"][3]["size"] = 1;
    });
    refused_change(FREE, "reads guidance: got no condition port", [](Json& table) {
        stage(table, "denoiser")["reads"].push_back({{"name", "guidance"}, {"dtype", "float32"}, {"shape", {"batch"}}});
    });
    refused_change(BUNDLE, "add no noise at the first", [](Json& table) { table["process"]["beta_start"] = 1e-17; });
    refused_change(BUNDLE, "leave no signal", [](Json& table) { table["process"]["beta_end"] = 0.999999; });
    refused_change(WAVE, "shift_growth: got 0.2, expected at most 0.1 either way",
                   [](Json& table) { table["process"] = {{"kind", "flow"}, {"shift_growth", 0.2}}; });
    refused_change(BUNDLE, "after all classes", [](Json& table) { table["null"]["labels"] = 0; });
    refused_change(BUNDLE, "labels: got 5 names, expected 6", [](Json& table) { table["null"] = Json::object(); });
}

TEST(Stages, Refusals) {
    const auto bad = [](const char* words, const std::function<void(Json&)>& change) {
        refused_change(WAVE, words, change);
    };
    bad("runs: got sometimes", [](Json& table) { stage(table, "summary")["runs"] = "sometimes"; });
    bad("stages that run 'step': got 0", [](Json& table) { stage(table, "denoiser")["runs"] = "time+condition"; });
    bad("stages that run 'step': got 2", [](Json& table) { stage(table, "context")["runs"] = "step"; });
    bad("stage 'context' is listed", [](Json& table) { stage(table, "summary")["name"] = "context"; });
    bad("port or tensor 'context' is listed",
        [](Json& table) { stage(table, "summary")["gives"][0]["name"] = "context"; });
    bad("port or tensor 'pooled' is listed",
        [](Json& table) { stage(table, "summary")["gives"][0]["name"] = "pooled"; });
    bad("no inputs or no outputs", [](Json& table) { stage(table, "summary")["reads"] = Json::array(); });
    bad("stage summary (runs 'condition') reads: got context, expected one of", [](Json& table) {
        std::swap(table["stages"][0], table["stages"][1]);  // before the stage that gives it
    });
    bad("stage modulation (runs 'condition') reads: got moment",
        [](Json& table) { stage(table, "modulation")["runs"] = "condition"; });
    bad("stage summary (runs 'time') reads", [](Json& table) { stage(table, "summary")["runs"] = "time"; });
    bad("stage summary (runs 'condition') reads: got signal", [](Json& table) {
        stage(table, "summary")["reads"][1] = {{"name", "signal"}, {"dtype", "float32"}, {"shape", {"rows", 6}}};
    });
    bad("pooled is: got float32 ['rows', 4], expected float32 ['rows', 5]",
        [](Json& table) { stage(table, "summary")["reads"][1]["shape"][1] = 4; });
    bad("pooled is: got int64", [](Json& table) { stage(table, "summary")["reads"][1]["dtype"] = "int64"; });
    bad("summary is: got float32 ['n', 8]", [](Json& table) { stage(table, "summary")["gives"][0]["shape"][0] = "n"; });
    bad("summary is: got int64", [](Json& table) { stage(table, "summary")["gives"][0]["dtype"] = "int64"; });
    bad("stage denoiser lacks: got signal", [](Json& table) { stage(table, "denoiser")["reads"].erase(0); });
    bad("context is: got float32 ['batch', 'groups', 3, 8]",
        [](Json& table) { stage(table, "denoiser")["reads"][2]["shape"] = {"batch", "groups", 3, 8}; });
    bad("gives: got prediction, sigma", [](Json& table) {
        Json& gives = stage(table, "denoiser")["gives"];
        gives.push_back(gives[0]);
        gives[1]["name"] = "sigma";
    });
    bad("input of stage denoiser 'signal'", [](Json& table) {
        Json& reads = stage(table, "denoiser")["reads"];
        reads.push_back(reads[0]);
    });
    bad("context.onnx has no size and sha256", [](Json& table) { table["files"].erase("context.onnx"); });
    refused_change(BUNDLE, "[3, height, width] a row",
                   [](Json& table) { stage(table, "decoder")["gives"][0]["shape"][1] = 4; });
    refused_change(BUNDLE, "coefficients is",
                   [](Json& table) { stage(table, "update")["reads"][3]["shape"] = {3, 2}; });
}

TEST_F(ManifestTest, PathsThatLeaveTheBundle) {
    for (const std::string name :
         {"../outside", "/etc/hostname", "a/../../outside", "..\\outside", "C:outside", "", "."}) {
        copy.restore();
        copy.edit([&](Json& table) { table["files"][name] = {{"size", 1}, {"sha256", ""}}; });
        refused({"leaves the bundle", "refused"});
    }
}

TEST_F(ManifestTest, Links) {
    std::filesystem::rename(copy.folder / "denoiser.onnx.data", copy.folder / "moved");
    std::filesystem::create_symlink("moved", copy.folder / "denoiser.onnx.data");
    refused({"denoiser.onnx.data", "link", "refused"});
    std::filesystem::create_directory_symlink(copy.folder, copy.folder / "sub");
    copy.edit(
        [](Json& table) { table["files"]["a/../x"] = table["files"]["sub/moved"] = table["files"]["parity.json"]; });
    EXPECT_THROW(inside(copy.folder, "sub/moved"), BundleError);
    std::filesystem::rename(copy.folder / "manifest.json", copy.folder / "there");
    std::filesystem::create_symlink("there", copy.folder / "manifest.json");
    refused({"no manifest.json"});
}

TEST_F(ManifestTest, FilesThatAreMissingOrOfAnotherSize) {
    copy.write("denoiser.onnx.data", "short");
    refused({"denoiser.onnx.data has 5 bytes", "rebuild"});
    std::filesystem::remove(copy.folder / "denoiser.onnx.data");
    refused({"denoiser.onnx.data is missing", "rebuild"});
}

TEST_F(ManifestTest, AFlippedByte) {
    const Manifest manifest = read(copy.folder);
    for (const std::string name : {"denoiser.onnx", "denoiser.onnx.data", "reference.npz"}) {
        std::string content = copy.bytes(name);
        content[content.size() / 2] = static_cast<char>(content[content.size() / 2] ^ 1);
        copy.write(name, content);
        EXPECT_THROW(check_files(copy.folder, manifest, {name}), BundleError) << name;
    }
    EXPECT_THROW(check_files(copy.folder, manifest, {"elsewhere"}), BundleError);
}

// Every key and index of a manifest.
void each_place(const Json& value, const Json::json_pointer& here, std::vector<Json::json_pointer>& places) {
    std::size_t index = 0;
    for (const auto& entry : value.items()) {
        const Json::json_pointer place = value.is_array() ? here / index++ : here / entry.key();
        places.push_back(place);
        if (entry.value().is_structured()) each_place(entry.value(), place, places);
    }
}

// The table with another value in this place, or without what is there.
Json changed(const Json& good, const Json::json_pointer& place, const Json* value) {
    Json table = good;
    if (value)
        table[place] = *value;
    else if (Json& parent = table[place.parent_pointer()]; parent.is_array())
        parent.erase(std::stoul(place.back()));
    else
        parent.erase(place.back());
    return table;
}

// Each value replaced by each of a few odd ones, and each key taken out: read, or a BundleError, but nothing else.
TEST_F(ManifestTest, NoChangeEndsInAnythingElse) {
    const Json good = Json::parse(copy.bytes("manifest.json"));
    std::vector<Json::json_pointer> places;
    each_place(good, Json::json_pointer(), places);
    const std::vector<Json> odd = {nullptr,       true,           -1,         0,        1.5,
                                   1e30,          INT64_MAX,      UINT64_MAX, "",       "x\xff\x00y",
                                   Json::array(), Json::object(), {nullptr},  {1, 2, 3}};
    int refusals = 0, read_again = 0;
    for (const auto& place : places) {
        for (std::size_t index = 0; index <= odd.size(); ++index) {
            const Json table = changed(good, place, index < odd.size() ? &odd[index] : nullptr);
            try {
                const Manifest manifest = parse(table.dump(-1, ' ', false, Json::error_handler_t::replace), "m");
                manifest.process.betas();
                ++read_again;
            } catch (const BundleError& error) {
                EXPECT_GT(std::string(error.what()).size(), 10u);
                ++refusals;
            }
        }
    }
    EXPECT_GT(refusals, 500);
    EXPECT_GT(read_again, 20);
}

TEST(Sizes, AreManifestsOfTheirOwn) {
    const Manifest first = read(SIZES), wide = first.at("32x64");
    EXPECT_EQ(wide.state().shape, (Shape{2, 4, 8}));
    EXPECT_EQ(wide.at("32x32").state().shape, first.state().shape);
    EXPECT_EQ(first.own("reference.npz"), "reference.npz");
    EXPECT_EQ(wide.own("reference.npz"), "reference-32x64.npz");
    EXPECT_EQ(wide.step().onnx_files().back(), "conditioner.onnx.data");
    refused_change(SIZES, "32", [](Json& table) { table["sizes"][0]["size"] = "32"; });
    refused_change(SIZES, "suffix", [](Json& table) { table["sizes"][0].erase("suffix"); });
    refused_change(SIZES, "a size", [](Json& table) { table["sizes"][0]["colour"] = "red"; });
    refused_change(SIZES, "name of a size", [](Json& table) { table["sizes"][0]["size"] = "64x64"; });
    refused_change(SIZES, "another one in another size",
                   [](Json& table) { table["sizes"][0]["stages"][0]["max_batch"] = 7; });
}

// refusals.py has asked Python about these very manifests.
TEST(Refusals, WhatPythonRefuses) {
    for (const std::string bundle : {BUNDLE, PROMPTED, EMBEDDED, SIZES}) {
        const BundleCopy copy(bundle);
        std::ifstream file(bundle + "-refused.json");
        const Json good = Json::parse(copy.bytes("manifest.json")), changes = Json::parse(file);
        for (const Json& change : changes) {
            const auto value = change.find("value");
            const Json::json_pointer place(change["place"].get<std::string>());
            copy.write("manifest.json", changed(good, place, value == change.end() ? nullptr : &*value).dump());
            EXPECT_THROW(read(copy.folder), BundleError) << bundle << change.dump();
        }
        EXPECT_GT(changes.size(), bundle == BUNDLE ? 1000u : bundle == PROMPTED ? 500u : 50u) << bundle;
    }
}

}  // namespace
}  // namespace dit_runtime
