#include "files.hpp"

#include <png.h>
#include <zlib.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>

#include "errors.hpp"
#include "npy.hpp"

namespace {

void write(const std::string& path, const std::string& bytes) {
    std::ofstream file(path, std::ios::binary);
    if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush())
        throw std::invalid_argument(path + ": cannot be written");
}

std::string join(const dit_runtime::Shape& shape) {
    std::vector<std::string> sizes;
    for (const std::int64_t size : shape) sizes.push_back(std::to_string(size));
    return dit_runtime::join(sizes);
}

dit_runtime::NpyArray read(const std::string& path, const std::string& what) {
    try {
        return dit_runtime::parse_npy(dit_runtime::read_bytes(path));
    } catch (const dit_runtime::NpyError& error) {
        throw std::invalid_argument(path + ": not " + what + ": " + error.what());
    }
}

// Integers, a row a line, such as token ids: all lines have as many.
dit_runtime::NpyArray read_lines(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::invalid_argument(path + ": cannot be read");
    std::vector<std::int64_t> numbers;
    dit_runtime::NpyArray array{{0, 0}, "i8", {}};
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::int64_t length = 0, number = 0;
        for (; words >> number; ++length) numbers.push_back(number);
        if (words.eof() && !length) continue;
        if (!array.shape[0]++) array.shape[1] = length;
        if (!words.eof() || length != array.shape[1])
            throw std::invalid_argument(
                dit_runtime::text(path, ": line ", array.shape[0], " has ", length,
                                  " integers; expected a row of them a line, all of one length"));
    }
    array.bytes.resize(numbers.size() * sizeof(std::int64_t));
    if (!numbers.empty()) std::memcpy(array.bytes.data(), numbers.data(), array.bytes.size());
    return array;
}

using NpyArrays = std::map<std::string, dit_runtime::NpyArray>;

NpyArrays read_arrays(const std::vector<std::string>& words, const std::string& flag) {
    if (words.size() == 1 && words[0].find('=') == std::string::npos) {
        try {
            return dit_runtime::parse_npz(dit_runtime::read_bytes(words[0]));
        } catch (const dit_runtime::NpyError& error) {
            throw std::invalid_argument(words[0] + ": not a .npz file of numbers: " + error.what());
        }
    }
    NpyArrays arrays;
    for (const std::string& word : words) {
        const std::size_t equals = word.find('=');
        const std::string name = word.substr(0, equals);
        if (name.empty() || equals + 1 >= word.size() || equals == std::string::npos || arrays.count(name))
            throw std::invalid_argument(flag + " '" + word +
                                        "'; expected NAME=FILE.npy, each name once, or one FILE.npz");
        const std::string path = word.substr(equals + 1);
        const bool lines = std::filesystem::path(path).extension() == ".txt";
        arrays[name] = lines ? read_lines(path) : read(path, "a .npy file of numbers");
    }
    return arrays;
}

// The library sees numbers and rows alone. A masked port may be shorter; a mask is as long as its port's array.
void require_shape(const dit::Port& port, const std::vector<dit::Port>& ports, const NpyArrays& arrays,
                   const std::string& where) {
    const dit_runtime::Shape& shape = arrays.at(port.name).shape;
    dit_runtime::Shape row(shape.begin() + 1, shape.end());
    std::vector<std::string> sizes = {"rows"};
    for (const std::int64_t size : port.shape) sizes.push_back(std::to_string(size));
    const auto masked = arrays.find(port.masks);
    if (masked != arrays.end() && masked->second.shape.size() > 1) {
        const std::int64_t rows = masked->second.shape[0], tokens = masked->second.shape[1];
        if (shape != dit_runtime::Shape{rows, tokens})
            throw std::invalid_argument(dit_runtime::text(where, " has shape [", join(shape), "]; expected [", rows,
                                                          ", ", tokens, "] of 0 and 1, a 1 in every row"));
        return;
    }
    const bool shorter =
        std::any_of(ports.begin(), ports.end(), [&](const dit::Port& mask) { return mask.masks == port.name; });
    if (shorter) sizes[1] = "up to " + sizes[1];
    if (shorter && row.size() == port.shape.size() && row[0] <= port.shape[0]) row[0] = port.shape[0];
    if (row != port.shape)
        throw std::invalid_argument(
            dit_runtime::text(where, " has shape [", join(shape), "]; expected [", dit_runtime::join(sizes), "]"));
}

// RGB pixels as a PNG.
void write_pixels(const std::string& path, const std::uint8_t* pixels, std::size_t width, std::size_t height) {
    png_image png;
    std::memset(&png, 0, sizeof png);
    png.version = PNG_IMAGE_VERSION;
    png.width = static_cast<png_uint_32>(width);
    png.height = static_cast<png_uint_32>(height);
    png.format = PNG_FORMAT_RGB;
    if (!png_image_write_to_file(&png, path.c_str(), 0, pixels, 0, nullptr))
        throw std::invalid_argument(path + ": cannot be written: " + png.message);
}

std::string little(std::uint64_t value, int width) {
    std::string bytes;
    for (int index = 0; index < width; ++index) bytes += static_cast<char>(value >> (8 * index));
    return bytes;
}

}  // namespace

void write_png(const std::string& path, const dit::Images& images) {
    const std::size_t square = static_cast<std::size_t>(std::ceil(std::sqrt(static_cast<double>(images.count))));
    const std::size_t columns = images.frames ? images.frames : square;
    const std::size_t count = images.count * std::max(images.frames, std::size_t{1});
    const std::size_t rows = (count + columns - 1) / columns, line = images.width * 3;
    std::vector<std::uint8_t> sheet(rows * images.height * columns * line, 0);
    for (std::size_t index = 0; index < count * images.height; ++index) {
        const std::size_t picture = index / images.height, y = index % images.height;
        const std::size_t place = (picture / columns * images.height + y) * columns + picture % columns;
        std::memcpy(&sheet[place * line], &images.pixels[index * line], line);
    }
    write_pixels(path, sheet.data(), columns * images.width, rows * images.height);
}

void write_folder(const std::string& path, const dit::Images& images) {
    std::error_code failure;
    std::filesystem::create_directory(path, failure);
    if (!std::filesystem::is_directory(path)) throw std::invalid_argument(path + ": no folder, and none can be made");
    const auto name = [](std::size_t number, std::size_t count) {
        const std::string digits = std::to_string(number);
        return std::string(std::to_string(count - 1).size() - digits.size(), '0') + digits;
    };
    const std::size_t frames = std::max(images.frames, std::size_t{1}), size = images.height * images.width * 3;
    for (std::size_t index = 0; index < images.count * frames; ++index) {
        std::string file = name(index / frames, images.count);
        if (images.frames) file += "-" + name(index % frames, frames);
        write_pixels((std::filesystem::path(path) / (file + ".png")).string(), &images.pixels[index * size],
                     images.width, images.height);
    }
}

void write_npz(const std::string& path, const dit::Images& images) {
    const std::string name = "arr_0.npy";
    const auto size = [](std::size_t length) { return static_cast<std::int64_t>(length); };
    dit_runtime::Shape shape = {size(images.count), size(images.height), size(images.width), 3};
    if (images.frames) shape.insert(shape.begin() + 1, size(images.frames));
    const std::string body = dit_runtime::npy_bytes("|u1", shape, images.pixels.data(), images.pixels.size());
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

dit::Condition read_condition(const std::vector<std::string>& words, const std::string& flag,
                              const std::vector<dit::Port>& ports) {
    const NpyArrays arrays = read_arrays(words, flag);
    dit::Condition condition;
    for (const auto& [name, from] : arrays) {
        const std::string where = (flag == "--condition" ? "condition: " : "negative: ") + name;
        if (from.shape.empty() || !from.size())
            throw std::invalid_argument(where + ": not a condition: expected numbers in rows, one a picture");
        for (const dit::Port& port : ports)
            if (port.name == name) require_shape(port, ports, arrays, where);
        dit::Array& array = condition[name];
        array.rows = static_cast<std::size_t>(from.shape[0]);
        if (from.kind[0] == 'f')
            array.floats = from.as<float>();
        else
            array.integers = from.as<std::int64_t>();
    }
    return condition;
}

std::vector<float> read_latents(const std::string& path, std::size_t rows, const std::vector<std::int64_t>& row) {
    const dit_runtime::NpyArray array = read(path, "latents to start from");
    dit_runtime::Shape shape = row;
    shape.insert(shape.begin(), rows || array.shape.empty() ? static_cast<std::int64_t>(rows) : array.shape[0]);
    if (array.shape != shape)
        throw std::invalid_argument(
            path + ": not latents to start from: it has another shape than the request and the bundle ask for");
    return array.as<float>();
}
