// Files that were made to do harm.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>

#include "bundle.hpp"
#include "errors.hpp"
#include "facts.hpp"
#include "npy.hpp"
#include "npz.hpp"
#include "pipeline.hpp"
#include "sha256.hpp"
#include "throws.hpp"
#include "verify.hpp"

namespace dit_runtime {
namespace {

using Json = nlohmann::json;

std::vector<unsigned char> bytes(const std::string& text) { return {text.begin(), text.end()}; }

std::string floats(const std::vector<float>& values) {
    return npy_bytes("<f4", {static_cast<std::int64_t>(values.size())}, values.data(), values.size() * sizeof(float));
}

TEST(HostileNpz, EntriesShareNothing) {
    const std::pair<std::string, std::string> one = {"a.npy", floats({1, 2})}, other = {"b.npy", floats({3})};
    EXPECT_EQ(parse_npz(bytes(npz_of({one, other}))).size(), 2u);
    throws<NpyError>("shares its bytes", [&] { parse_npz(bytes(npz_of({one, other}, {0}))); });
    throws<NpyError>("more than once", [&] { parse_npz(bytes(npz_of({one, {"a.npy", floats({3})}}))); });
    std::string overlapping = npz_of({one, {"b.npy", floats({3})}});
    const std::size_t second = overlapping.rfind("PK\1\2");  // begins inside of the first file, as if it were one
    overlapping.replace(second + 42, 4, little(1, 4));
    overlapping.replace(1, 4, "PK\3\4");
    EXPECT_THROW(parse_npz(bytes(overlapping)), NpyError);
    std::string locked = npz_of({one}), moved = locked;
    locked[locked.find("PK\1\2") + 8] |= 1;
    throws<NpyError>("is encrypted", [&] { parse_npz(bytes(locked)); });
    moved[moved.size() - 10] ^= 1;
    throws<NpyError>("not where it ends", [&] { parse_npz(bytes(moved)); });
    throws<NpyError>("header has", [&] {
        std::string header = floats({1});
        header.insert(100, std::string(20000, ' '));
        header.replace(8, 2, little(header.size() - 14, 2));
        parse_npy(bytes(header));
    });
    std::string changed = npz_of({one});
    changed[changed.find("PK\1\2") - 1] ^= 1;
    throws<NpyError>("does not have its checksum", [&] { parse_npz(bytes(changed)); });
}

TEST(HostileNpz, NumbersThatDoNotFit) {
    const double large[] = {1e300}, nan[] = {std::nan("")};
    EXPECT_THROW(parse_npy(bytes(npy_bytes("<f8", {1}, large, 8))).as<float>(), NpyError);
    EXPECT_TRUE(std::isnan(parse_npy(bytes(npy_bytes("<f8", {1}, nan, 8))).as<float>()[0]));
    EXPECT_EQ(parse_npy(bytes(npy_bytes("<f8", {1}, large, 8))).as<double>()[0], 1e300);
    const std::int64_t integers[] = {256, -1};
    EXPECT_THROW(parse_npy(bytes(npy_bytes("<i8", {1}, integers, 8))).as<std::uint8_t>(), NpyError);
    EXPECT_THROW(parse_npy(bytes(npy_bytes("<i8", {1}, integers + 1, 8))).as<std::uint8_t>(), NpyError);
}

// The reference of a copied bundle with one array replaced.
class HostileReference : public ::testing::Test {
  protected:
    void refused(const std::string& words, const std::string& name, const std::string& array) {
        const BundleCopy copy;
        auto arrays = parse_npz(bytes(copy.bytes("reference.npz")));
        std::vector<std::pair<std::string, std::string>> files;
        for (const auto& [key, value] : arrays)
            if (key != name)
                files.emplace_back(key + ".npy", npy_bytes((value.kind[1] == '1' ? "|" : "<") + value.kind, value.shape,
                                                           value.bytes.data(), value.bytes.size()));
        files.emplace_back(name + ".npy", array);
        const std::string content = npz_of(files);
        copy.write("reference.npz", content);
        copy.edit([&](Json& table) {
            table["files"]["reference.npz"] = {{"size", content.size()},
                                               {"sha256", sha256(copy.folder / "reference.npz")}};
        });
        Options options;
        options.low_memory = true;  // no engine opens before the reference is read
        Pipeline pipe(copy.folder, options);
        throws<BundleError>(words, [&] { verify(pipe, [](const Figure&) {}); });
    }

    const std::map<std::string, NpyArray> good = parse_npz(read_bytes(Path(BUNDLE) / "reference.npz"));

    // The array with its numbers replaced, as float64.
    std::string filled(const std::string& name, double value) const {
        const NpyArray& array = good.at(name);
        const std::vector<double> values(array.size(), value);
        return npy_bytes("<f8", array.shape, values.data(), values.size() * sizeof(double));
    }
};

TEST_F(HostileReference, NumbersThatAreNotFinite) {
    for (const char* name :
         {"betas", "timesteps", "guidance", "latents", "prediction", "conditional", "null", "fingerprint"})
        for (const double value : {std::nan(""), HUGE_VAL, 1e300})
            refused(name == std::string("betas") || name == std::string("timesteps") || std::isfinite(value) == 0
                        ? text(name, ": it holds values that are not finite")
                        : text(name, ": it holds 1e+300"),
                    name, filled(name, value));
}

TEST_F(HostileReference, KindsShapesAndCounts) {
    refused("seeds: it holds floats; expected integers", "seeds", filled("seeds", 1));
    refused("images: it holds floats; expected integers", "images", filled("images", 1));
    const NpyArray& images = good.at("images");
    const std::vector<std::int64_t> wide(images.size(), 256);
    refused("images: it holds 256; expected 0 to 255", "images",
            npy_bytes("<i8", images.shape, wide.data(), wide.size() * 8));
    const std::vector<double> many(static_cast<std::size_t>(limit("evaluations")) + 1, 1);
    refused("timesteps has shape [1025], expected [1] to [1000]", "timesteps",
            npy_bytes("<f8", {1025}, many.data(), many.size() * 8));
    const std::vector<std::int64_t> seeds(static_cast<std::size_t>(limit("samples")) + 1, 1);
    refused("seeds has shape [65], expected [1] to [64]", "seeds",
            npy_bytes("<i8", {65}, seeds.data(), seeds.size() * 8));
    refused("seeds has shape [0]", "seeds", npy_bytes("<i8", {0}, "", 0));
    const NpyArray& labels = good.at("condition.labels");
    const std::vector<std::int64_t> most(labels.size(), std::numeric_limits<std::int64_t>::max());
    refused("holds other values than the integers from 0 to 5", "condition.labels",
            npy_bytes("<i8", labels.shape, most.data(), most.size() * 8));
    const NpyArray& latents = good.at("latents");
    Shape turned = latents.shape;
    std::swap(turned[2], turned[3]);
    ASSERT_NE(turned, latents.shape);
    refused("latents has shape", "latents", npy_bytes("<f4", turned, latents.bytes.data(), latents.bytes.size()));
}

TEST(HostileManifest, IsLimited) {
    const BundleCopy copy;
    const std::string content = copy.bytes("manifest.json");
    copy.write("manifest.json",
               content + std::string(static_cast<std::size_t>(limit("manifest_bytes")) - content.size(), ' '));
    EXPECT_EQ(read(copy.folder).files.size(), Json::parse(content)["files"].size());
    copy.write("manifest.json", content + std::string(static_cast<std::size_t>(limit("manifest_bytes")), ' '));
    throws<BundleError>("bytes; expected at most 4194304", [&] { read(copy.folder); });
    const auto refused = [&](const std::string& words, const std::function<void(Json&)>& change) {
        Json table = Json::parse(content);
        change(table);
        throws<BundleError>(words, [&] { parse(table.dump(), "changed"); });
    };
    const auto entry = [](std::size_t size) { return Json{{"size", size}, {"sha256", ""}}; };
    refused("files: got 4097 entries, expected at most 4096", [&](Json& table) {
        for (int file = 0; table["files"].size() < 4097; ++file) table["files"][text("file", file)] = entry(1);
    });
    refused("bytes in all, expected at most", [&](Json& table) {
        for (int file = 0; file < 3; ++file) table["files"][text("file", file)] = entry(std::size_t{100} << 30);
    });
    refused("an integer from 0 to", [&](Json& table) { table["files"]["file"] = entry(std::size_t{1} << 62); });
    for (const char* key : {"ports", "stages", "labels", "prompts", "sizes"})
        refused(text("expected at most ", limit(key)), [&](Json& table) {
            table[key] = std::vector<Json>(static_cast<std::size_t>(limit(key)) + 1, Json("x"));
        });
    refused("65537 classes, expected at most 65536", [](Json& table) {
        for (Json& port : table["ports"])
            if (port["name"] == "labels") port["size"] = 65538;
        table["null"]["labels"] = 65537;
        table["labels"] = Json::array();
    });
}

// Words of a bundle do not steer the terminal, and a message is one line of at most 300 characters.
TEST(Words, AreOneLine) {
    EXPECT_EQ(one_line("a\n b\t c"), "a b c");
    EXPECT_EQ(one_line("\x1b[31mred\x7f"), "\\x1b[31mred\\x7f");
    EXPECT_EQ(one_line("é 世界 🙂 …"), "é 世界 🙂 …");
    EXPECT_EQ(one_line("\u202eleft\u2066\u200b\u0085"), "\\u202eleft\\u2066\\u200b\\x85");
    EXPECT_EQ(one_line("\xff\xc0\x80 \xed\xa0\x80"), "\\xff\\xc0\\x80 \\xed\\xa0\\x80");
    EXPECT_EQ(one_line("\U000E0041"), "\\U000e0041");
    EXPECT_EQ(one_line(std::string("a\0b", 3)), "a\\x00b");
    EXPECT_EQ(one_line(std::string(300, 'a')), std::string(300, 'a'));
    EXPECT_EQ(one_line(std::string(301, 'a')), std::string(197, 'a') + " … " + std::string(100, 'a'));
    EXPECT_EQ(one_line("begin" + std::string(20 << 20, 'x') + "end"),
              "begin" + std::string(192, 'x') + " … " + std::string(97, 'x') + "end");
    const std::string escapes = one_line(std::string(1000, '\x1b'));
    EXPECT_LE(escapes.size(), 302u);  // of which three bytes are one character
    EXPECT_EQ(escapes.find("\\x1b\\x1b"), 0u);
    EXPECT_EQ(printable("a\nb\x1b"), "a\nb\\x1b");
}

// A program's locale may write 1.000,5.
TEST(Words, NumbersDoNotFollowTheLocale) {
    struct Commas : std::numpunct<char> {
        char do_decimal_point() const override { return ','; }
        char do_thousands_sep() const override { return '.'; }
        std::string do_grouping() const override { return "\3"; }
    };
    const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Commas));
    EXPECT_EQ(text(1000.5, " ", 1234567), "1000.5 1234567");
    EXPECT_EQ(number("1000.5"), 1000.5);
    std::locale::global(before);
    EXPECT_EQ(number("-1e3"), -1000);
    EXPECT_EQ(number("+2"), 2);
    for (const char* word : {"", "1,5", "1 ", " 1", "+-1", "1x", "0x10", "--1"}) EXPECT_FALSE(number(word)) << word;
}

// What glibc, Xbyak and a failing thread say: OpenVINO repeats it as a failure to compile.
TEST(Words, ShortMemoryIsNoDamagedBundle) {
    for (const char* const words : {"Cannot allocate memory", "can't alloc", "Resource temporarily unavailable"})
        EXPECT_THROW(throw_if_grave(text("x.onnx: OpenVINO does not compile it: ", words)), EngineMemory) << words;
    EXPECT_NO_THROW(throw_if_grave("x.onnx: OpenVINO does not compile it: op Foo is not known"));
}

}  // namespace
}  // namespace dit_runtime
