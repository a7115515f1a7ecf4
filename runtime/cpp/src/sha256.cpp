#include "sha256.hpp"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <vector>

#include "errors.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#define DIT_SHA_INSTRUCTIONS 1
#elif defined(__aarch64__) && defined(__GNUC__) && (defined(__linux__) || defined(__APPLE__))
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif
#define DIT_SHA_INSTRUCTIONS 1
#endif

namespace dit_runtime {
namespace {

alignas(16) constexpr std::uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// A rotation, which compilers make one instruction of.
inline std::uint32_t rotate(std::uint32_t word, int count) { return word >> count | word << (32 - count); }

inline std::uint32_t big_endian(const unsigned char* bytes) {
    return std::uint32_t{bytes[0]} << 24 | std::uint32_t{bytes[1]} << 16 | std::uint32_t{bytes[2]} << 8 | bytes[3];
}

// Puts word i of a block, or of the 16 that the 16 before lead to, into the ring of 16 words.
inline std::uint32_t load_word(std::uint32_t* w, const unsigned char* bytes, int i) {
    return w[i] = big_endian(bytes + 4 * i);
}
inline std::uint32_t next_word(std::uint32_t* w, const unsigned char*, int i) {
    const std::uint32_t early = w[(i + 1) & 15], late = w[(i + 14) & 15];
    return w[i] += (rotate(early, 7) ^ rotate(early, 18) ^ early >> 3) + w[(i + 9) & 15] +
                   (rotate(late, 17) ^ rotate(late, 19) ^ late >> 10);
}

// A round. The caller renames the eight words instead of moving them, and a & b of a round is b & c of the next.
#define DIT_SHA_ROUND(a, b, c, d, e, f, g, h, number, word)                                         \
    h += (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + (g ^ (e & (f ^ g))) + K[number] + (word); \
    d += h;                                                                                         \
    differ = a ^ b;                                                                                 \
    h += (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + (b ^ (differ & differed));                \
    differed = differ

#define DIT_SHA_8_ROUNDS(word, first, place)                                             \
    DIT_SHA_ROUND(a, b, c, d, e, f, g, h, first + place + 0, word(w, bytes, place + 0)); \
    DIT_SHA_ROUND(h, a, b, c, d, e, f, g, first + place + 1, word(w, bytes, place + 1)); \
    DIT_SHA_ROUND(g, h, a, b, c, d, e, f, first + place + 2, word(w, bytes, place + 2)); \
    DIT_SHA_ROUND(f, g, h, a, b, c, d, e, first + place + 3, word(w, bytes, place + 3)); \
    DIT_SHA_ROUND(e, f, g, h, a, b, c, d, first + place + 4, word(w, bytes, place + 4)); \
    DIT_SHA_ROUND(d, e, f, g, h, a, b, c, first + place + 5, word(w, bytes, place + 5)); \
    DIT_SHA_ROUND(c, d, e, f, g, h, a, b, first + place + 6, word(w, bytes, place + 6)); \
    DIT_SHA_ROUND(b, c, d, e, f, g, h, a, first + place + 7, word(w, bytes, place + 7))

void plain_blocks(std::uint32_t* state, const unsigned char* bytes, std::size_t count) {
    std::uint32_t w[16];
    for (; count; --count, bytes += 64) {
        std::uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        std::uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        std::uint32_t differ, differed = b ^ c;
        DIT_SHA_8_ROUNDS(load_word, 0, 0);
        DIT_SHA_8_ROUNDS(load_word, 0, 8);
        for (int first = 16; first < 64; first += 16) {
            DIT_SHA_8_ROUNDS(next_word, first, 0);
            DIT_SHA_8_ROUNDS(next_word, first, 8);
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
        state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
}

#if defined(DIT_SHA_INSTRUCTIONS) && defined(__x86_64__)
bool has_instructions() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
}

__attribute__((target("sha,sse4.1,ssse3"))) void fast_blocks(std::uint32_t* state, const unsigned char* bytes,
                                                             std::size_t count) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i dcba = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state)), 0xB1);
    __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(state + 4)), 0x1B);
    __m128i abef = _mm_alignr_epi8(dcba, hgfe, 8);
    __m128i cdgh = _mm_blend_epi16(hgfe, dcba, 0xF0);
    for (; count; --count, bytes += 64) {
        const __m128i first = abef, second = cdgh;
        __m128i w[16];
        for (int i = 0; i < 16; ++i) {
            if (i < 4) {
                w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes) + i), swap);
            } else {
                const __m128i sum =
                    _mm_add_epi32(_mm_sha256msg1_epu32(w[i - 4], w[i - 3]), _mm_alignr_epi8(w[i - 1], w[i - 2], 4));
                w[i] = _mm_sha256msg2_epu32(sum, w[i - 1]);
            }
            const __m128i words = _mm_add_epi32(w[i], _mm_load_si128(reinterpret_cast<const __m128i*>(K) + i));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, words);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(words, 0x0E));
        }
        abef = _mm_add_epi32(abef, first);
        cdgh = _mm_add_epi32(cdgh, second);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1B);
    const __m128i dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state), _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}
#elif defined(DIT_SHA_INSTRUCTIONS)
bool has_instructions() {
#ifdef __linux__
    constexpr unsigned long SHA2 = 1ul << 6;  // HWCAP_SHA2 of arm64
    return (getauxval(AT_HWCAP) & SHA2) != 0;
#else
    return true;  // each of Apple's has them
#endif
}

__attribute__((target("+crypto"))) void fast_blocks(std::uint32_t* state, const unsigned char* bytes,
                                                    std::size_t count) {
    uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
    for (; count; --count, bytes += 64) {
        const uint32x4_t first = abcd, second = efgh;
        uint32x4_t w[16];
        for (int i = 0; i < 16; ++i) {
            if (i < 4)
                w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(bytes + 16 * i)));
            else
                w[i] = vsha256su1q_u32(vsha256su0q_u32(w[i - 4], w[i - 3]), w[i - 2], w[i - 1]);
            const uint32x4_t words = vaddq_u32(w[i], vld1q_u32(K + 4 * i)), before = abcd;
            abcd = vsha256hq_u32(abcd, efgh, words);
            efgh = vsha256h2q_u32(efgh, before, words);
        }
        abcd = vaddq_u32(abcd, first);
        efgh = vaddq_u32(efgh, second);
    }
    vst1q_u32(state, abcd);
    vst1q_u32(state + 4, efgh);
}
#endif

}  // namespace

void Sha256::blocks(const unsigned char* bytes, std::size_t count) {
#ifdef DIT_SHA_INSTRUCTIONS
    static const bool fast = has_instructions();
    if (fast && !plain) return fast_blocks(state_.data(), bytes, count);
#endif
    plain_blocks(state_.data(), bytes, count);
}

void Sha256::update(const unsigned char* bytes, std::size_t size) {
    const std::size_t held = static_cast<std::size_t>(length_ % 64);
    length_ += size;
    if (held) {
        const std::size_t part = std::min(size, 64 - held);
        std::memcpy(rest_.data() + held, bytes, part);
        if (held + part < 64) return;
        blocks(rest_.data(), 1);
        bytes += part;
        size -= part;
    }
    blocks(bytes, size / 64);
    if (size % 64) std::memcpy(rest_.data(), bytes + size / 64 * 64, size % 64);
}

std::string Sha256::hex() {
    const std::uint64_t bits = length_ * 8;
    const std::size_t held = static_cast<std::size_t>(length_ % 64);
    unsigned char padding[72] = {0x80};
    const std::size_t zeros = (held < 56 ? 56 : 120) - held;
    for (std::size_t i = 0; i < 8; ++i) padding[zeros + i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
    update(padding, zeros + 8);
    std::string digits;
    for (const std::uint32_t word : state_)
        for (int shift = 28; shift >= 0; shift -= 4) digits += "0123456789abcdef"[word >> shift & 15];
    return digits;
}

std::string sha256(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw BundleError(path.string() + ": cannot be opened");
    Sha256 sum;
    std::vector<char> buffer(1 << 20);
    do {
        file.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
        sum.update(reinterpret_cast<const unsigned char*>(buffer.data()), static_cast<std::size_t>(file.gcount()));
    } while (file);
    if (file.bad()) throw BundleError(path.string() + ": cannot be read to its end");
    return sum.hex();
}

}  // namespace dit_runtime
