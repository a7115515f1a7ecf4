#include "pictures.hpp"

#include <png.h>

#include <cstring>
#include <stdexcept>

#include "errors.hpp"
#include "png_files.hpp"

namespace server {

namespace dit = dit_runtime;

std::string png(const std::uint8_t* pixels, std::size_t height, std::size_t width) {
    png_image image;
    std::memset(&image, 0, sizeof image);
    image.version = PNG_IMAGE_VERSION;
    image.width = static_cast<png_uint_32>(width);
    image.height = static_cast<png_uint_32>(height);
    image.format = PNG_FORMAT_RGB;
    std::string bytes(PNG_IMAGE_PNG_SIZE_MAX(image), '\0');
    png_alloc_size_t size = bytes.size();
    if (!png_image_write_to_memory(&image, bytes.data(), &size, 0, pixels, 0, nullptr))
        throw std::runtime_error(std::string("no PNG: ") + image.message);
    bytes.resize(size);
    return bytes;
}

void read_files(Body& body, std::size_t height, std::size_t width) {
    const auto read = [&](const std::string& name, bool is_mask) -> std::optional<dit::Pictures> {
        const auto file = body.files.find(name);
        if (file == body.files.end()) return std::nullopt;
        const auto* const bytes = reinterpret_cast<const unsigned char*>(file->second.data());
        try {
            const Png png = read_png(bytes, file->second.size(), name, height, width, "the bundle's size");
            const dit::Shape shape = {1, static_cast<std::int64_t>(height), static_cast<std::int64_t>(width)};
            if (is_mask) return dit::Pictures{shape, png.mask()};
            return dit::Pictures{{shape[0], shape[1], shape[2], 3}, png.colours()};
        } catch (const std::invalid_argument& error) {
            throw Fault{400, dit::one_line(error.what()), name};
        }
    };
    body.image = read("image", false);
    body.mask = read("mask", true);
    body.files.clear();
}

std::string base64(const std::string& bytes) {
    static const char* const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string text;
    text.reserve((bytes.size() + 2) / 3 * 4);
    for (std::size_t first = 0; first < bytes.size(); first += 3) {
        std::uint32_t group = 0;
        for (std::size_t index = 0; index < 3; ++index)
            group = group << 8 | (first + index < bytes.size() ? static_cast<unsigned char>(bytes[first + index]) : 0u);
        for (std::size_t letter = 0; letter < 4; ++letter)
            text += first + letter > bytes.size() ? '=' : letters[group >> (6 * (3 - letter)) & 63];
    }
    return text;
}

}  // namespace server
