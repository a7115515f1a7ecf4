#include "images.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dit_runtime {

std::vector<std::uint8_t> to_uint8(const std::vector<float>& images, const Shape& shape) {
    std::vector<std::uint8_t> bytes(images.size());
    const std::size_t planes = static_cast<std::size_t>(shape.at(1));
    const std::size_t area = static_cast<std::size_t>(shape.at(2) * shape.at(3));
    for (std::size_t i = 0; i < images.size(); ++i) {
        const std::size_t sample = i / (planes * area), plane = i / area % planes, place = i % area;
        const double level = static_cast<double>(std::clamp(images[i], 0.0f, 1.0f));
        bytes[(sample * area + place) * planes + plane] = static_cast<std::uint8_t>(std::nearbyint(level * 255));
    }
    return bytes;
}

double psnr(const std::uint8_t* first, const std::uint8_t* second, std::size_t size, double peak) {
    double error = 0;
    for (std::size_t i = 0; i < size; ++i) {
        const double difference = static_cast<double>(first[i]) - second[i];
        error += difference * difference;
    }
    error /= static_cast<double>(size);
    return error == 0 ? std::numeric_limits<double>::infinity() : 10 * std::log10(peak * peak / error);
}

}  // namespace dit_runtime
