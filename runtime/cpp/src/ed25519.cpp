#include "ed25519.hpp"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "sha512.hpp"

namespace dit_runtime::ed25519 {
namespace {

// Numbers of 256 bits, the lowest byte first.
using Bytes = Key;
constexpr Bytes P = {0xed, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                     0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f};
// The order of the base point.
constexpr Bytes L = {0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14,
                     0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x10};

bool is_below(const Bytes& number, const Bytes& bound) {
    return std::lexicographical_compare(number.rbegin(), number.rend(), bound.rbegin(), bound.rend());
}

// Takes the modulus off a number that is not below it.
void reduce(Bytes& number, const Bytes& modulus) {
    if (is_below(number, modulus)) return;
    int borrow = 0;
    for (std::size_t i = 0; i < number.size(); ++i) {
        const int digit = number[i] - modulus[i] - borrow;
        borrow = digit < 0;
        number[i] = static_cast<unsigned char>(digit & 0xff);
    }
}

// A number modulo P in 16 digits, the lowest first, each below 2^17.
class Number {
  public:
    Number(unsigned small = 0) : digits_{small} {}
    explicit Number(const Bytes& bytes) {
        for (std::size_t i = 0; i < SIZE; ++i) digits_[i] = bytes[2 * i] | unsigned{bytes[2 * i + 1]} << 8;
    }

    friend Number operator+(const Number& a, const Number& b) {
        Number sum;
        for (std::size_t i = 0; i < SIZE; ++i) sum.digits_[i] = a.digits_[i] + b.digits_[i];
        return sum.carried();
    }

    friend Number operator-(const Number& a, const Number& b) {
        Number difference;
        for (std::size_t i = 0; i < SIZE; ++i)  // 8 P more, so that no digit is below 0
            difference.digits_[i] = a.digits_[i] + 4 * (i ? 0xffff : 0x10000 - WRAP) - b.digits_[i];
        return difference.carried();
    }

    friend Number operator*(const Number& a, const Number& b) {
        std::array<std::uint64_t, 2 * SIZE> all = {};
        for (std::size_t i = 0; i < SIZE; ++i)
            for (std::size_t j = 0; j < SIZE; ++j) all[i + j] += a.digits_[i] * b.digits_[j];
        Number product;
        for (std::size_t i = 0; i < SIZE; ++i) product.digits_[i] = all[i] + WRAP * all[i + SIZE];
        return product.carried();
    }

    friend bool operator==(const Number& a, const Number& b) { return a.bytes() == b.bytes(); }

    // The one form below P.
    Bytes bytes() const {
        const Number last = carried();  // digits that were carried before have 16 bits now
        Bytes bytes;
        for (std::size_t i = 0; i < bytes.size(); ++i)
            bytes[i] = static_cast<unsigned char>(last.digits_[i / 2] >> i % 2 * 8 & 0xff);
        for (int time = 0; time < 2; ++time) reduce(bytes, P);
        return bytes;
    }

    bool odd() const { return bytes()[0] & 1; }

  private:
    static constexpr std::size_t SIZE = 16;
    static constexpr std::uint64_t WRAP = 38;  // 2^256 modulo P

    // From digits below 2^44, as a product has: the first pass carries up to 2^29 out of the last digit, the second 1.
    Number carried() const {
        Number own = *this;
        for (int pass = 0; pass < 2; ++pass) {
            std::uint64_t carry = 0;
            for (std::uint64_t& digit : own.digits_) {
                digit += carry;
                carry = digit >> 16;
                digit &= 0xffff;
            }
            own.digits_[0] += WRAP * carry;
        }
        return own;
    }

    std::array<std::uint64_t, SIZE> digits_;
};

// The bits of a number, the highest first.
template <typename Visit>
void each_bit(const Bytes& number, const Visit& visit) {
    for (std::size_t bit = 256; bit-- > 0;) visit(number[bit / 8] >> bit % 8 & 1);
}

Number power(const Number& base, const Bytes& exponent) {
    Number product = 1;
    each_bit(exponent, [&](bool one) {
        product = product * product;
        if (one) product = product * base;
    });
    return product;
}

// P + number, over 2^shift, for exponents.
Bytes near_p(int number, int shift) {
    Bytes bytes = P;
    bytes[0] = static_cast<unsigned char>(bytes[0] + number);  // 0xed: no carry from -5 to 3
    for (; shift; --shift)
        for (std::size_t i = 0; i < bytes.size(); ++i)
            bytes[i] =
                static_cast<unsigned char>(bytes[i] >> 1 | (i + 1 < bytes.size() ? bytes[i + 1] << 7 & 0x80 : 0));
    return bytes;
}

Number inverse(const Number& number) { return power(number, near_p(-2, 0)); }

const Number& curve_d() {
    static const Number d = (Number() - 121665) * inverse(121666);
    return d;
}

Number twice(const Number& number) { return number + number; }

// x = X / Z, y = Y / Z and x y = T / Z on the curve -x² + y² = 1 + D x² y².
struct Point {
    Number x = 0, y = 1, z = 1, t = 0;
};

// The sum; the formula holds for any two points of the curve, equal ones among them.
Point add(const Point& first, const Point& second) {
    const Number a = (first.y - first.x) * (second.y - second.x), b = (first.y + first.x) * (second.y + second.x);
    const Number c = twice(curve_d()) * first.t * second.t, d = twice(first.z) * second.z;
    const Number e = b - a, f = d - c, g = d + c, h = b + a;
    return {e * f, g * h, f * g, e * h};
}

Point multiply(const Bytes& scalar, const Point& point) {
    Point total;
    each_bit(scalar, [&](bool one) {
        total = add(total, total);
        if (one) total = add(total, point);
    });
    return total;
}

// Whether the point's order divides 8: a key or R of such an order signs what nobody signed.
bool is_small(const Point& point) {
    const Point multiple = multiply({8}, point);
    return multiple.x == 0 && multiple.y == multiple.z;
}

Bytes encode(const Point& point) {
    const Number over = inverse(point.z);
    Bytes bytes = (point.y * over).bytes();
    if ((point.x * over).odd()) bytes[31] |= 0x80;
    return bytes;
}

// The point of an encoding; none where there is none, or where the point has another encoding.
std::optional<Point> decode(const Bytes& bytes) {
    Bytes own = bytes;
    own[31] &= 0x7f;
    const bool sign = bytes[31] >> 7;
    const Number y(own), square = (y * y - 1) * inverse(curve_d() * y * y + 1);  // x²
    Number x = power(square, near_p(3, 3));
    if (!(x * x == square)) x = x * power(2, near_p(-1, 2));  // a root of -1
    if (!(x * x == square) || !is_below(own, P) || (x == 0 && sign)) return std::nullopt;
    if (x.odd() != sign) x = Number() - x;
    return Point{x, y, 1, x * y};
}

const Point& base() {
    static const Point point = decode((4 * inverse(5)).bytes()).value();
    return point;
}

// SHA-512 of R, the key and the message, modulo L.
Bytes hash_number(const Bytes& r, const Key& key, const std::string& message) {
    std::vector<unsigned char> all(r.begin(), r.end());
    all.insert(all.end(), key.begin(), key.end());
    all.insert(all.end(), message.begin(), message.end());
    const auto digest = sha512(std::move(all));
    Bytes rest = {};
    for (std::size_t bit = 8 * digest.size(); bit-- > 0;) {
        for (std::size_t i = rest.size(); i-- > 0;)
            rest[i] =
                static_cast<unsigned char>(rest[i] << 1 | (i ? rest[i - 1] >> 7 : digest[bit / 8] >> bit % 8 & 1));
        reduce(rest, L);
    }
    return rest;
}

}  // namespace

bool verify(const Key& key, const std::string& message, const Signature& signature) {
    Bytes r, s;
    std::copy(signature.begin(), signature.begin() + 32, r.begin());
    std::copy(signature.begin() + 32, signature.end(), s.begin());
    const std::optional<Point> point = decode(key);
    if (!point || is_small(*point) || !is_below(s, L)) return false;
    const auto [x, y, z, t] = multiply(hash_number(r, key, message), *point);
    const Point end = add(multiply(s, base()), {Number() - x, y, z, Number() - t});
    return encode(end) == r && !is_small(end);
}

}  // namespace dit_runtime::ed25519
