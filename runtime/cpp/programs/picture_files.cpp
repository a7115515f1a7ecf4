#include "picture_files.hpp"

#include <stdexcept>

#include "npy.hpp"
#include "png_files.hpp"

namespace {

// A file's picture, which has the size where the height is not 0; else the size becomes the picture's.
Png read(const std::string& path, std::size_t& height, std::size_t& width, const char* reason) {
    std::vector<unsigned char> content;
    try {
        content = dit_runtime::read_bytes(path);
    } catch (const dit_runtime::NpyError& error) {
        throw std::invalid_argument(path + ": " + error.what());
    }
    Png png = read_png(content.data(), content.size(), path, height, width, reason);
    height = png.height, width = png.width;
    return png;
}

}  // namespace

dit::Images read_pictures(const std::vector<std::string>& paths, std::size_t height, std::size_t width,
                          const char* reason) {
    dit::Images images;
    for (const std::string& path : paths) {
        const std::vector<std::uint8_t> colours = read(path, height, width, reason).colours();
        images.pixels.insert(images.pixels.end(), colours.begin(), colours.end());
    }
    images.count = paths.size();
    images.height = height;
    images.width = width;
    return images;
}

std::vector<std::uint8_t> read_masks(const std::vector<std::string>& paths, std::size_t height, std::size_t width,
                                     const char* reason) {
    std::vector<std::uint8_t> masks;
    for (const std::string& path : paths) {
        const std::vector<std::uint8_t> mask = read(path, height, width, reason).mask();
        masks.insert(masks.end(), mask.begin(), mask.end());
    }
    return masks;
}
