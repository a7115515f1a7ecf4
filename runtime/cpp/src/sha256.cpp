#include "sha256.hpp"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <vector>

#include "call.hpp"
#include "errors.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
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

std::uint32_t rotate(std::uint32_t word, int count) { return word >> count | word << (32 - count); }

void plain_block(std::uint32_t* state, const unsigned char* bytes) {
    std::uint32_t w[64];
    for (int i = 0; i < 16; ++i, bytes += 4)
        w[i] = std::uint32_t{bytes[0]} << 24 | std::uint32_t{bytes[1]} << 16 | std::uint32_t{bytes[2]} << 8 | bytes[3];
    for (int i = 16; i < 64; ++i) {
        const std::uint32_t low = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
        const std::uint32_t high = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + low + w[i - 7] + high;
    }
    std::uint32_t v[8];
    std::copy(state, state + 8, v);
    for (int i = 0; i < 64; ++i) {
        const std::uint32_t e = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
        const std::uint32_t first = v[7] + e + ((v[4] & v[5]) ^ (~v[4] & v[6])) + K[i] + w[i];
        const std::uint32_t a = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
        const std::uint32_t second = a + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        std::copy_backward(v, v + 7, v + 8);
        v[4] += first;
        v[0] = first + second;
    }
    for (int i = 0; i < 8; ++i) state[i] += v[i];
}

#ifdef DIT_SHA_INSTRUCTIONS
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
#endif

}  // namespace

void Sha256::blocks(const unsigned char* bytes, std::size_t count) {
#ifdef DIT_SHA_INSTRUCTIONS
    static const bool fast = has_instructions();
    if (fast && !plain) return fast_blocks(state_.data(), bytes, count);
#endif
    for (; count; --count, bytes += 64) plain_block(state_.data(), bytes);
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
        count_bytes(static_cast<std::uint64_t>(file.gcount()));
    } while (file);
    if (file.bad()) throw BundleError(path.string() + ": cannot be read to its end");
    return sum.hex();
}

}  // namespace dit_runtime
