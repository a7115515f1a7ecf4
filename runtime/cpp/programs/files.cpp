#include "files.hpp"

#include <png.h>
#include <zlib.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "npy.hpp"

namespace {

void write(const std::string& path, const std::string& bytes) {
    std::ofstream file(path, std::ios::binary);
    if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush())
        throw std::invalid_argument(path + ": cannot be written");
}

dit_runtime::NpyArray read(const std::string& path, const std::string& what) {
    try {
        return dit_runtime::parse_npy(dit_runtime::read_bytes(path));
    } catch (const dit_runtime::NpyError& error) {
        throw std::invalid_argument(path + ": not " + what + ": " + error.what());
    }
}

std::string little(std::uint64_t value, int width) {
    std::string bytes;
    for (int index = 0; index < width; ++index) bytes += static_cast<char>(value >> (8 * index));
    return bytes;
}

}  // namespace

void write_png(const std::string& path, const dit::Images& images) {
    const std::size_t columns = static_cast<std::size_t>(std::ceil(std::sqrt(static_cast<double>(images.count))));
    const std::size_t rows = (images.count + columns - 1) / columns, line = images.width * 3;
    std::vector<std::uint8_t> sheet(rows * images.height * columns * line, 0);
    for (std::size_t index = 0; index < images.count * images.height; ++index) {
        const std::size_t picture = index / images.height, y = index % images.height;
        const std::size_t place = (picture / columns * images.height + y) * columns + picture % columns;
        std::memcpy(&sheet[place * line], &images.pixels[index * line], line);
    }
    png_image png;
    std::memset(&png, 0, sizeof png);
    png.version = PNG_IMAGE_VERSION;
    png.width = static_cast<png_uint_32>(columns * images.width);
    png.height = static_cast<png_uint_32>(rows * images.height);
    png.format = PNG_FORMAT_RGB;
    if (!png_image_write_to_file(&png, path.c_str(), 0, sheet.data(), 0, nullptr))
        throw std::invalid_argument(path + ": cannot be written: " + png.message);
}

void write_npz(const std::string& path, const dit::Images& images) {
    const std::string name = "arr_0.npy";
    const auto size = [](std::size_t length) { return static_cast<std::int64_t>(length); };
    const std::string body =
        dit_runtime::npy_bytes("|u1", {size(images.count), size(images.height), size(images.width), 3},
                               images.pixels.data(), images.pixels.size());
    if (body.size() >= 0xFFFFFFFFu) throw std::invalid_argument(path + ": more than 4 GB do not fit into one .npz");
    const auto sum = crc32_z(0, reinterpret_cast<const Bytef*>(body.data()), body.size());
    // Version, flags, method, time, date, sum, sizes, length of the name and of what follows it.
    const std::string common = little(20, 2) + little(0, 4) + little(0, 2) + little(0x21, 2) + little(sum, 4) +
                               little(body.size(), 4) + little(body.size(), 4) + little(name.size(), 2) + little(0, 2);
    const std::string local = little(0x04034b50, 4) + common + name + body;
    const std::string entry = little(0x02014b50, 4) + little(20, 2) + common + little(0, 14) + name;
    const std::string end = little(0x06054b50, 4) + little(0, 4) + little(1, 2) + little(1, 2) +
                            little(entry.size(), 4) + little(local.size(), 4) + little(0, 2);
    write(path, local + entry + end);
}

void write_npy(const std::string& path, const std::vector<float>& values, const std::vector<std::int64_t>& shape) {
    write(path, dit_runtime::npy_bytes("<f4", shape, values.data(), values.size() * sizeof(float)));
}

dit::Captions read_captions(const std::string& path, const std::string& mask, const char* flag) {
    dit::Captions captions;
    if (path.empty()) {
        if (!mask.empty()) throw std::invalid_argument(mask + ": a mask without " + flag);
        return captions;
    }
    const dit_runtime::NpyArray array = read(path, "text embeddings");
    if (array.shape.size() != 3 || !array.size())
        throw std::invalid_argument(path + ": not text embeddings: expected the shape (captions, tokens, channels)");
    captions.count = static_cast<std::size_t>(array.shape[0]);
    captions.tokens = static_cast<std::size_t>(array.shape[1]);
    captions.embeddings = array.as<float>();
    if (mask.empty()) return captions;
    const dit_runtime::NpyArray tokens = read(mask, "a mask");
    if (tokens.shape != dit_runtime::Shape{array.shape[0], array.shape[1]})
        throw std::invalid_argument(mask + ": not the mask of " + path +
                                    ": it has another shape than (captions, tokens)");
    captions.mask = tokens.as<float>();
    return captions;
}

std::vector<float> read_latents(const std::string& path, const std::vector<std::int64_t>& shape) {
    const dit_runtime::NpyArray array = read(path, "latents to start from");
    if (array.shape != shape)
        throw std::invalid_argument(path +
                                    ": not latents to start from: it has another shape than labels and bundle ask for");
    return array.as<float>();
}
