// NumPy's files: .npy, and .npz as np.savez writes it (stored, not compressed).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "errors.hpp"
#include "manifest.hpp"

namespace dit_runtime {

// A defect of the file; the caller adds the file's name.
struct NpyError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// IEEE 754's binary16: 5 bits of exponent, 10 of fraction.
struct Half {
    std::uint16_t bits;
    operator float() const {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        const float size = exponent < 31 ? std::ldexp(static_cast<float>(exponent ? 1024 + fraction : fraction),
                                                      std::max(exponent, 1) - 25)
                           : fraction    ? NAN
                                         : INFINITY;
        return bits >> 15 ? -size : size;
    }
};

struct NpyArray {
    Shape shape;
    std::string kind;  // "f2", "f4", "f8", "i4", "i8", "u1" or "b1", little-endian
    std::vector<unsigned char> bytes;

    std::size_t size() const { return kind.empty() ? 0 : bytes.size() / static_cast<std::size_t>(kind[1] - '0'); }

    // The numbers as T: floats are rounded, and what T cannot hold is refused, floats as integers among it.
    template <typename T>
    std::vector<T> as() const {
        if (kind == "f2") return cast<Half, T>();
        if (kind == "f4") return cast<float, T>();
        if (kind == "f8") return cast<double, T>();
        if (kind == "i4") return cast<std::int32_t, T>();
        if (kind == "i8") return cast<std::int64_t, T>();
        return cast<std::uint8_t, T>();
    }

  private:
    template <typename From, typename T>
    std::vector<T> cast() const {
        if constexpr (std::is_integral_v<T> && !std::is_integral_v<From>)
            throw NpyError("it holds floats; expected integers");
        using Most = std::numeric_limits<T>;
        std::vector<T> values(size());
        for (std::size_t index = 0; index < values.size(); ++index) {
            From value;
            std::memcpy(&value, &bytes[index * sizeof(From)], sizeof(From));
            if constexpr (std::is_integral_v<T> && sizeof(From) > sizeof(T))
                if (value < From{Most::min()} || value > From{Most::max()})
                    throw NpyError(text("it holds ", value, "; expected ", +Most::min(), " to ", +Most::max()));
            if constexpr (std::is_same_v<T, float> && std::is_same_v<From, double>)
                if (std::isfinite(value) && std::abs(value) > double{Most::max()})
                    throw NpyError(text("it holds ", value, "; expected numbers of float32"));
            values[index] = static_cast<T>(value);
        }
        return values;
    }
};

NpyArray parse_npy(const std::vector<unsigned char>& content);
std::map<std::string, NpyArray> parse_npz(const std::vector<unsigned char>& content);

// A whole file of at most `most` bytes.
std::vector<unsigned char> read_bytes(const std::filesystem::path& path, std::uintmax_t most = 1u << 30);

// The bytes of a .npy file of this dtype ("<f4", "|u1") and shape.
std::string npy_bytes(const std::string& dtype, const Shape& shape, const void* data, std::size_t bytes);

}  // namespace dit_runtime
