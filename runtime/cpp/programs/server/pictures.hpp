// Image files, and bytes as text.
#pragma once

#include <cstdint>
#include <string>

#include "body.hpp"

namespace server {

// uint8 [height, width, 3] as a PNG.
std::string png(const std::uint8_t* pixels, std::size_t height, std::size_t width);

// Decodes the body's files, which must be PNGs of this size; throws Fault(400).
void read_files(Body& body, std::size_t height, std::size_t width);

std::string base64(const std::string& bytes);

}  // namespace server
