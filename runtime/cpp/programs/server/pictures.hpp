// An image file, and bytes as text.
#pragma once

#include <cstdint>
#include <string>

namespace server {

// uint8 [height, width, 3] as a PNG.
std::string png(const std::uint8_t* pixels, std::size_t height, std::size_t width);

std::string base64(const std::string& bytes);

}  // namespace server
