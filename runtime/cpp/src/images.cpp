#include "images.hpp"

#include <algorithm>
#include <cmath>

namespace dit_runtime {

std::vector<std::uint8_t> to_uint8(const std::vector<float>& images, const Shape& shape) {
    std::vector<std::uint8_t> bytes(images.size());
    const std::size_t planes = static_cast<std::size_t>(shape.at(1));
    const std::size_t area = count({shape.begin() + 2, shape.end()});
    for (std::size_t i = 0; i < images.size(); ++i) {
        const std::size_t sample = i / (planes * area), plane = i / area % planes, place = i % area;
        const double level = static_cast<double>(std::clamp(images[i], 0.0f, 1.0f));
        bytes[(sample * area + place) * planes + plane] = static_cast<std::uint8_t>(std::nearbyint(level * 255));
    }
    return bytes;
}

std::vector<float> to_unit(const std::vector<std::uint8_t>& pictures, const Shape& shape) {
    std::vector<float> planes(pictures.size());
    const auto area = static_cast<std::size_t>(shape.at(1) * shape.at(2)),
               channels = static_cast<std::size_t>(shape.at(3));
    for (std::size_t i = 0; i < pictures.size(); ++i) {
        const std::size_t sample = i / (area * channels), place = i / channels % area, channel = i % channels;
        planes[(sample * channels + channel) * area + place] = static_cast<float>(pictures[i]) / 255.0f;
    }
    return planes;
}

}  // namespace dit_runtime
