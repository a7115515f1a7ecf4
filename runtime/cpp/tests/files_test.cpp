// SHA-256, NumPy's files and the words of messages.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "errors.hpp"
#include "images.hpp"
#include "npy.hpp"
#include "sha256.hpp"

namespace dit_runtime {
namespace {

std::string sum(const std::string& message, bool plain, std::size_t part = 1 << 20) {
    Sha256 state;
    state.plain = plain;
    for (std::size_t at = 0; at < message.size(); at += part)
        state.update(reinterpret_cast<const unsigned char*>(message.data()) + at, std::min(part, message.size() - at));
    return state.hex();
}

// The examples of FIPS 180-4, and the million a's.
TEST(Sha256, Vectors) {
    for (const bool plain : {false, true}) {
        EXPECT_EQ(sum("", plain), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        EXPECT_EQ(sum("abc", plain), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        EXPECT_EQ(sum("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", plain),
                  "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
        EXPECT_EQ(sum(std::string(1000000, 'a'), plain, 997),
                  "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    }
}

TEST(Sha256, BothWaysAgreeAtEveryLength) {
    std::string message;
    for (int length = 0; length < 200; ++length) {
        EXPECT_EQ(sum(message, false), sum(message, true)) << length;
        EXPECT_EQ(sum(message, false, 7), sum(message, true, 64)) << length;
        message += static_cast<char>(length * 37);
    }
    std::string changed = message;
    changed[100] = static_cast<char>(changed[100] ^ 1);
    EXPECT_NE(sum(message, false), sum(changed, false));
}

std::vector<unsigned char> bytes(const std::string& text) { return {text.begin(), text.end()}; }

TEST(Npy, ThereAndBack) {
    const std::vector<float> values = {1, 2.5, -3, 4, 5, 6};
    const NpyArray array = parse_npy(bytes(npy_bytes("<f4", {2, 3}, values.data(), 24)));
    EXPECT_EQ(array.shape, (Shape{2, 3}));
    EXPECT_EQ(array.as<float>(), values);
    EXPECT_EQ(array.as<double>()[1], 2.5);
    EXPECT_EQ(parse_npy(bytes(npy_bytes("|u1", {3}, "abc", 3))).as<std::uint8_t>()[2], 'c');
    EXPECT_EQ(parse_npy(bytes(npy_bytes("<f4", {0, 3}, "", 0))).size(), 0u);
    EXPECT_EQ(parse_npy(bytes(npy_bytes("|b1", {3}, "\1\0\1", 3))).as<float>(), (std::vector<float>{1, 0, 1}));
}

TEST(Npy, Halves) {
    const std::uint16_t bits[] = {0x3C00, 0xC000, 0x0001, 0x83FF, 0x7BFF, 0x3555, 0xFC00, 0x7E00};
    const auto values = parse_npy(bytes(npy_bytes("<f2", {8}, bits, sizeof bits))).as<double>();
    const std::vector<double> expected = {1, -2, 0x1p-24, -1023 * 0x1p-24, 65504, 1365 * 0x1p-12, -INFINITY};
    EXPECT_EQ(std::vector<double>(values.begin(), values.end() - 1), expected);
    EXPECT_TRUE(std::isnan(values.back()));
}

TEST(Npy, FloatsAreNoIntegers) {
    const float values[] = {1, 1e30f};
    const NpyArray array = parse_npy(bytes(npy_bytes("<f4", {2}, values, sizeof values)));
    EXPECT_THROW(array.as<std::int64_t>(), NpyError);
    EXPECT_THROW(array.as<std::uint8_t>(), NpyError);
    EXPECT_EQ(array.as<double>()[0], 1);
}

TEST(Npy, Refusals) {
    for (const auto& [dtype, shape] : std::vector<std::pair<std::string, Shape>>{
             {"<f4", {7}}, {"<f4", {1 << 20, 1 << 20, 1 << 20}}, {"|O", {3}}, {">f4", {3}}, {"<c8", {1}}, {"", {}}})
        EXPECT_THROW(parse_npy(bytes(npy_bytes(dtype, shape, "123456789012", 12))), NpyError) << dtype;
    const std::string large(1 << 25, ' ');  // 2**25 bytes, 2**39 times: 2**64 is 0
    EXPECT_THROW(parse_npy(bytes(npy_bytes("<f4", {1 << 23, std::int64_t{1} << 39}, large.data(), large.size()))),
                 NpyError);
    const std::string good = npy_bytes("<f4", {3}, "123456789012", 12);
    for (std::size_t length = 0; length < good.size(); ++length)
        EXPECT_THROW(parse_npy(bytes(good.substr(0, length))), NpyError) << length;
}

// Every byte of a small archive changed, and every length: an answer or a refusal, and no read outside (sanitizers).
TEST(Npz, Damage) {
    std::ifstream file(std::string(BUNDLE) + "/reference.npz", std::ios::binary);
    const std::string good((std::istreambuf_iterator<char>(file)), {});
    ASSERT_GT(good.size(), 1000u) << "the bundle of the tests is not there: run through ctest";
    EXPECT_EQ(parse_npz(bytes(good)).count("latents"), 1u);
    int refused = 0;
    for (std::size_t at = 0; at < good.size(); at += at < good.size() - 1500 ? 53 : 1) {
        std::string changed = good;
        changed[at] = static_cast<char>(changed[at] ^ 0xFF);
        try {
            parse_npz(bytes(changed));
        } catch (const NpyError&) {
            ++refused;
        }
        EXPECT_THROW(parse_npz(bytes(good.substr(0, at))), NpyError);
    }
    EXPECT_GT(refused, 100);
}

TEST(Words, Nearest) {
    EXPECT_EQ(nearest("golden retreiver", {"ant", "golden retriever"}), " (did you mean \"golden retriever\"?)");
    EXPECT_EQ(nearest("zzz", {"ant", "golden retriever"}), "");
    EXPECT_EQ(strip("  a b\n"), "a b");
    EXPECT_EQ(strip(" \t"), "");
}

// Halves go to the even neighbour, as np.rint; what is outside of [0, 1] is clipped.
TEST(Images, Rounding) {
    const std::vector<float> levels = {0.5f / 255, 1.5f / 255, 2.5f / 255, -1, 2, 1};
    const auto bytes_of = to_uint8(levels, {1, 3, 1, 2});
    std::vector<int> planes = {bytes_of[0], bytes_of[3], bytes_of[1], bytes_of[4], bytes_of[2], bytes_of[5]};
    const auto exact = [](float level) { return static_cast<int>(std::nearbyint(static_cast<double>(level) * 255)); };
    EXPECT_EQ(planes, (std::vector<int>{exact(levels[0]), exact(levels[1]), exact(levels[2]), 0, 255, 255}));
    EXPECT_EQ(to_uint8({0.5f, 0.5f, 0.5f}, {1, 3, 1, 1})[0], 128);  // 127.5 is a tie
    EXPECT_EQ(to_uint8(levels, {1, 3, 1, 1, 2}), bytes_of);         // a frame of two pixels
}

}  // namespace
}  // namespace dit_runtime
