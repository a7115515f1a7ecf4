#include "noise.hpp"

#include <cmath>
#include <memory>

#include "errors.hpp"

namespace dit_runtime {
namespace {

const double PI = 3.141592653589793;

// A block of 16 uniforms, 8 radii and 8 angles, to 16 normals in place; every operation rounds to float.
//
// log, sin and cos are taken in double and rounded, so that Python and C++ get the same bits from different maths
// libraries; PyTorch's own vector routines are within one ulp of that.
void box_muller(float* block) {
    for (int index = 0; index < 8; ++index) {
        const float u1 = 1.0f - block[index], u2 = block[index + 8];
        const float radius = std::sqrt(-2.0f * static_cast<float>(std::log(static_cast<double>(u1))));
        const double angle = static_cast<double>(static_cast<float>(2 * PI) * u2);
        block[index] = radius * static_cast<float>(std::cos(angle));
        block[index + 8] = radius * static_cast<float>(std::sin(angle));
    }
}

}  // namespace

std::vector<float> Noise::normal(std::size_t size) {
    std::vector<float> values(size);
    if (size < 16) {
        for (float& value : values) value = static_cast<float>(next());
        return values;
    }
    for (float& value : values) value = uniform();
    for (std::size_t first = 0; first + 16 <= size; first += 16) box_muller(&values[first]);
    if (size % 16) {
        float* last = &values[size - 16];
        for (int index = 0; index < 16; ++index) last[index] = uniform();
        box_muller(last);
    }
    return values;
}

float Noise::uniform() { return static_cast<float>(bits() & 0xFFFFFF) * 0x1p-24f; }

// One value in double; the sine of a pair waits for the next call, across draws.
double Noise::next() {
    if (cached_) {
        const double value = *cached_;
        cached_.reset();
        return value;
    }
    std::uint64_t words[4];
    for (auto& word : words) word = bits();
    const std::uint64_t mask = (std::uint64_t{1} << 53) - 1;
    const double angle = 2.0 * PI * (static_cast<double>((words[0] << 32 | words[1]) & mask) * 0x1p-53);
    const double uniform = static_cast<double>((words[2] << 32 | words[3]) & mask) * 0x1p-53;
    const double radius = std::sqrt(-2.0 * std::log1p(-uniform));
    cached_ = radius * std::sin(angle);
    return radius * std::cos(angle);
}

Draw draw(const std::vector<std::uint64_t>& seeds, std::size_t batch) {
    if (seeds.size() != 1 && seeds.size() != batch)
        throw UsageError(text(seeds.size(), " seeds for ", batch,
                              " samples; expected one seed, or one a sample: give each picture its prompt or label"));
    const auto streams = std::make_shared<std::vector<Noise>>(seeds.begin(), seeds.end());
    return [streams](std::size_t size) {
        std::vector<float> values;
        values.reserve(size);
        for (Noise& stream : *streams) {
            const std::vector<float> part = stream.normal(size / streams->size());
            values.insert(values.end(), part.begin(), part.end());
        }
        return values;
    };
}

}  // namespace dit_runtime
