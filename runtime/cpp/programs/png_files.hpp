// PNG files of 8 bits a channel, checked before they are decoded. Mirrors dit_runtime/picture_files.py, but for other
// formats and for resizing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct Png {
    std::size_t height = 0, width = 0;
    std::vector<std::uint8_t> pixels = {};  // [height, width, 4]: red, green, blue, alpha

    std::vector<std::uint8_t> colours() const;  // [height, width, 3]; EXIF data and alpha are left out
    // [height, width]: white where the file is transparent, if it is anywhere; else where it is white.
    std::vector<std::uint8_t> mask() const;
};

// Decodes a file's content. Throws std::invalid_argument, in a sentence that begins with `name`, where it is damaged,
// animated or too large, or has not this size, which is `reason`. A height of 0 allows any.
Png read_png(const unsigned char* bytes, std::size_t size, const std::string& name, std::size_t height,
             std::size_t width, const char* reason);
