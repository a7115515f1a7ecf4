// SHA-512 (FIPS 180-4), for signatures: of what is small, in one call.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

namespace dit_runtime {

std::array<unsigned char, 64> sha512(std::vector<unsigned char> message);

}  // namespace dit_runtime
