// Graphs that read what is not theirs, and files that change under a bundle that is open.
#include "checking.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "bundle.hpp"
#include "errors.hpp"
#include "external.hpp"
#include "pipeline.hpp"
#include "sha256.hpp"
#include "throws.hpp"

namespace dit_runtime {
namespace {

using Json = nlohmann::json;

// A field of a protobuf message: bytes.
std::string field(int number, const std::string& content) {
    std::string bytes(1, static_cast<char>(number << 3 | 2));
    if (number > 15) bytes = {static_cast<char>((number << 3 | 2 | 0x80) & 0xFF), static_cast<char>(number >> 4)};
    std::size_t length = content.size();
    for (; length > 127; length >>= 7) bytes += static_cast<char>(0x80 | (length & 127));
    return bytes + static_cast<char>(length) + content;
}

std::string tensor_at(const std::string& location) {
    return field(13, field(1, "offset") + field(2, "0")) + field(13, field(1, "location") + field(2, location));
}

TEST(External, LocationsOfEveryPlace) {
    const std::string nested = field(1, field(5, field(6, field(5, tensor_at("nested")))));  // node, attribute, graph
    const std::string graph = nested + field(5, tensor_at("weights")) +
                              field(1, field(5, field(5, tensor_at("constant")))) +
                              field(15, field(1, tensor_at("sparse")));
    const std::string model = std::string("\x08\x0b", 2) + field(7, graph) +
                              field(20, field(1, field(5, tensor_at("training")))) +
                              field(25, field(7, field(5, field(10, tensor_at("function")))));
    EXPECT_EQ(locations(model),
              (std::set<std::string>{"constant", "function", "nested", "sparse", "training", "weights"}));
    EXPECT_TRUE(locations("").empty());
    for (std::size_t length = 1; length < model.size(); ++length) try {
            locations(model.substr(0, length));
        } catch (const std::invalid_argument&) {
        }
    std::string deep = tensor_at("deep");
    for (int level = 0; level < 100; ++level) deep = field(1, field(5, field(6, deep)));
    throws<std::invalid_argument>("deep", [&] { locations(field(7, deep)); });
    throws<std::invalid_argument>("64 bits", [&] { locations("\x0a" + std::string(11, '\xff')); });
}

// Its graph reads a file that the manifest does not name, or what is no file.
TEST(External, EveryLocationIsListed) {
    const std::string own = "denoiser.onnx.data";
    for (const std::string other :
         {"otherfile.onnx.dat", "../bundle/deno.dat", "*/_ORT_MEM_ADDR_/*", "reference.npz/././"}) {
        ASSERT_EQ(own.size(), other.size());
        const BundleCopy copy;
        std::string content = copy.bytes("denoiser.onnx");
        for (std::size_t at = 0; (at = content.find(own, at)) != std::string::npos;)
            content.replace(at, own.size(), other);
        copy.write("denoiser.onnx", content);
        copy.write("otherfile.onnx.dat", copy.bytes(own));
        copy.edit([&](Json& table) {
            table["files"]["denoiser.onnx"]["sha256"] = sha256(copy.folder / "denoiser.onnx");
            if (other[0] == '*') {
                std::filesystem::create_directories(copy.folder / "*" / "_ORT_MEM_ADDR_");
                std::filesystem::copy(copy.folder / own, copy.folder / other);
                table["files"][other] = table["files"][own];
                for (Json& stage : table["stages"])
                    if (stage["name"] == "denoiser") stage["shared"] = {other};
            }
        });
        for (const Backend& backend : backends()) {
            Options options;
            options.backend = backend.name;
            if (backend.opens_onnx)
                throws<BundleError>("which is no file of its stage; refused", [&] { Pipeline(copy.folder, options); });
        }
    }
}

class Swapped : public ::testing::TestWithParam<const char*> {
  protected:
    void SetUp() override {
        options.backend = GetParam();
        options.threads = 1;
        const auto& known = backends();
        if (std::none_of(known.begin(), known.end(),
                         [&](const Backend& backend) { return backend.name == GetParam(); }))
            GTEST_SKIP() << GetParam() << " was not found when the library was built";
    }

    static Request request(std::size_t count) {
        Request request;
        request.labels.assign(count, 1);
        request.seeds.assign(count, 3);
        request.steps = 2;
        return request;
    }

    // The weights with other numbers, which are sound ones.
    std::string others(const std::string& name) const {
        std::string content = copy.bytes(name);
        for (std::size_t at = 0; at + 4 <= content.size(); at += 4)
            content[at + 3] = static_cast<char>(content[at + 3] ^ 0x80);
        return content;
    }

    void put(const std::string& name, const std::string& content) const {
        copy.write("new", content);
        std::filesystem::rename(copy.folder / "new", copy.folder / name);
    }

    const std::string weights = "denoiser.onnx.data";
    const BundleCopy copy;
    Options options;
};

INSTANTIATE_TEST_SUITE_P(Engines, Swapped, ::testing::Values("onnxruntime", "openvino"));

// What is compiled later is what was checked: OpenVINO makes requests for single rows when one first comes.
TEST_P(Swapped, AnotherFileChangesNothing) {
    options.threads = 2;
    Pipeline before(copy.folder, options), pipe(copy.folder, options);
    Request single = request(1);
    single.guidance = {1};
    const std::vector<float> one = before.latents(single), two = before.latents(request(2));
    put(weights, others(weights));
    EXPECT_EQ(pipe.latents(request(2)), two);
    EXPECT_EQ(pipe.latents(single), one);
    throws<BundleError>("sha256", [&] { Pipeline(copy.folder, options); });
}

TEST_P(Swapped, AFileThatIsWrittenIsRefused) {
    Pipeline pipe(copy.folder, options);
    const std::vector<float> expected = pipe.latents(request(2));
    const std::string good = copy.bytes(weights), bad = others(weights);
    const auto overwrite = [&](const std::string& content) {
        std::fstream(copy.folder / weights, std::ios::binary | std::ios::in | std::ios::out) << content;
    };
    overwrite(bad);
    throws<BundleError>("was written while it was open", [&] { pipe.latents(request(1)); });
    overwrite(good);
    EXPECT_EQ(pipe.latents(request(2)), expected);
}

TEST_P(Swapped, InLowMemoryFilesAreComparedAgain) {
    options.low_memory = true;
    Pipeline pipe(copy.folder, options);
    const std::vector<float> expected = pipe.latents(request(1));
    const std::string good = copy.bytes(weights);
    put(weights, others(weights));
    pipe.close();
    throws<BundleError>("does not have the sha256 of its manifest", [&] { pipe.latents(request(1)); });
    put(weights, good);
    EXPECT_EQ(pipe.latents(request(1)), expected);
}

class CheckingTest : public ::testing::Test {
  protected:
    void check(const std::function<void()>& meanwhile, const std::string& name = "denoiser.onnx.data") {
        CheckedFiles checked;
        Checking sums(copy.folder, manifest, {name}, checked);
        meanwhile();
        sums.finish();
        EXPECT_EQ(checked.size(), 1u);
    }

    const BundleCopy copy;
    const Manifest manifest = read(copy.folder);
    const Path path = copy.folder / "denoiser.onnx.data";
};

TEST_F(CheckingTest, AFileThatChangesMeanwhileIsRefused) {
    check([] {});
    const std::string good = copy.bytes("denoiser.onnx.data");
    throws<BundleError>("was changed while it was opened", [&] {
        check([&] {
            copy.write("new", good);
            std::filesystem::rename(copy.folder / "new", path);
        });
    });
    throws<BundleError>("was changed while it was opened", [&] {
        check([&] {  // swapped and put back
            std::filesystem::rename(path, copy.folder / "old");
            copy.write("denoiser.onnx.data", good);
            std::filesystem::rename(copy.folder / "old", path);
        });
    });
    throws<BundleError>("is a link; refused", [&] {
        check([&] {
            std::filesystem::rename(path, copy.folder / "old");
            std::filesystem::create_symlink("old", path);
        });
    });
}

TEST_F(CheckingTest, WhatIsNoFileIsRefused) {
    std::filesystem::rename(path, copy.folder / "old");
    std::filesystem::create_symlink("old", path);
    throws<BundleError>("is a link; refused", [&] { check([] {}); });
    std::filesystem::remove(path);
    ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
    throws<BundleError>("is no file", [&] { check([] {}); });  // and it is not waited for
    std::filesystem::remove(path);
    std::filesystem::create_directory(path);
    throws<BundleError>("is no file", [&] { check([] {}); });
    throws<BundleError>("leaves the bundle", [&] { BundleFile(copy.folder, "../x"); });
    std::filesystem::create_directory_symlink(copy.folder, copy.folder / "folder");
    throws<BundleError>("is a link; refused", [&] { BundleFile(copy.folder, "folder/manifest.json"); });
}

// A sum of 8 TB of nothing ends when it is asked to.
TEST_F(CheckingTest, SumsStop) {
    std::filesystem::resize_file(path, std::uintmax_t{8} << 40);
    const std::atomic<bool> stop{true};
    EXPECT_EQ(BundleFile(copy.folder, "denoiser.onnx.data").sha256(stop), Sha256().hex());
    throws<BundleError>("bytes; expected at most 100",
                        [&] { BundleFile(copy.folder, "denoiser.onnx.data").read(100); });
}

TEST(Trust, FoldersOfOthers) {
    const BundleCopy copy;
    const Path folder = copy.folder / "cache";
    EXPECT_TRUE(is_trusted(folder)) << "it is not there";
    std::filesystem::create_directory(folder);
    chmod(folder.c_str(), 0700);
    EXPECT_TRUE(is_trusted(folder));
    for (const mode_t mode : {0720, 0702}) {
        chmod(folder.c_str(), mode);
        EXPECT_FALSE(is_trusted(folder)) << mode;
    }
    chmod(folder.c_str(), 0700);
    std::filesystem::create_directory_symlink(folder, copy.folder / "link");
    EXPECT_FALSE(is_trusted(copy.folder / "link"));
    copy.write("file", "");
    EXPECT_FALSE(is_trusted(copy.folder / "file"));
    if (geteuid() != 0) return;
    ASSERT_EQ(chown(folder.c_str(), 1, 1), 0);
    EXPECT_FALSE(is_trusted(folder)) << "it is somebody else's";
}

}  // namespace
}  // namespace dit_runtime
