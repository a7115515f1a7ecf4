// What a manifest may say, and the files it names.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "bundle.hpp"
#include "errors.hpp"
#include "manifest.hpp"

namespace dit_runtime {
namespace {

using Json = nlohmann::json;

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
    EXPECT_EQ(manifest.num_classes, 5);
    EXPECT_EQ(manifest.labels[3], "dog, hound");
    EXPECT_EQ(manifest.conditioning_shape(), (Shape{2, 8}));
    EXPECT_EQ(manifest.graphs.at("denoiser").max_batch, 3);
    for (const auto& graph : manifest.graphs) check_files(copy.folder, manifest, graph.second.files());
}

TEST_F(ManifestTest, Format) {
    for (const Json& format : {Json(2), Json(99), Json(UINT64_MAX)}) {
        copy.edit([&](Json& table) { table["format"] = format; });
        refused({"manifest.json", "expected 1", "upgrade"});
    }
    copy.edit([](Json& table) { table["format"] = 0; });
    refused({"expected 1", "rebuild"});
    for (const Json& format : {Json("1"), Json(nullptr), Json(1.5), Json(Json::array())}) {
        copy.edit([&](Json& table) { table["format"] = format; });
        refused({"no format number", "expected 1"});
    }
}

TEST_F(ManifestTest, NotJson) {
    for (const std::string content :
         {"", "{", "[]", "null", "\"a\"", "{\"format\": 1}", "\xef\xbb\xbf{}", "\xff\xfe\xfd"}) {
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
    copy.edit([](Json& table) { table["graphs"]["denoiser"]["batch"] = 1; });
    refused({"unknown key 'batch'"});
    copy.restore();
    copy.edit([](Json& table) { table["diffusion"]["sampler"]["clip"] = true; });
    refused({"process.sampler", "unknown key 'clip'"});
}

TEST_F(ManifestTest, Captions) {
    const auto read_again = [](const std::function<void(Json&)>& change) {
        Json table = Json::parse(std::ifstream(std::string(CAPTIONED) + "/manifest.json"));
        change(table);
        return parse(table.dump(), "captioned");
    };
    const Manifest manifest = read_again([](Json&) {});
    EXPECT_EQ(manifest.caption_shape(), (Shape{5, 3}));
    EXPECT_EQ(manifest.context_shape(), (Shape{5, 8}));
    EXPECT_EQ(read(copy.folder).caption_shape(), Shape());
    for (const char* end : {"inputs", "outputs"})
        for (const char* shape : {"[\"n\", 5]", "[\"n\", \"l\", 3]", "[\"n\"]", "[\"n\", 5, 16777216]", "[]", "null"})
            EXPECT_THROW(
                read_again([&](Json& table) { table["graphs"]["context"][end][0]["shape"] = Json::parse(shape); }),
                BundleError)
                << end << shape;
    EXPECT_THROW(read_again([](Json& table) { table["graphs"]["contxt"] = table["graphs"]["context"]; }), BundleError);
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
                manifest.diffusion.betas();
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

// refusals.py has asked Python about every place of this very manifest.
TEST_F(ManifestTest, WhatPythonRefuses) {
    std::ifstream file(REFUSED);
    const Json good = Json::parse(copy.bytes("manifest.json")), changes = Json::parse(file);
    for (const Json& change : changes) {
        const auto value = change.find("value");
        const Json::json_pointer place(change["place"].get<std::string>());
        copy.write("manifest.json", changed(good, place, value == change.end() ? nullptr : &*value).dump());
        EXPECT_THROW(read(copy.folder), BundleError) << change.dump();
    }
    EXPECT_GT(changes.size(), 1000u);
}

}  // namespace
}  // namespace dit_runtime
