// The pictures and masks that dit-generate takes, from PNG files.
#pragma once

#include <string>
#include <vector>

#include "dit/dit.hpp"

// The pictures of the files, [files, height, width, 3]; alpha is left out. EXIF data are not read. A height of 0 is
// that of the first file; else another size is refused, in a sentence that ends in `reason`.
dit::Images read_pictures(const std::vector<std::string>& paths, std::size_t height, std::size_t width,
                          const char* reason);

// The masks of the files, bytes [files, height, width]: white where a file is transparent, if it is anywhere; else
// where it is white.
std::vector<std::uint8_t> read_masks(const std::vector<std::string>& paths, std::size_t height, std::size_t width,
                                     const char* reason);
