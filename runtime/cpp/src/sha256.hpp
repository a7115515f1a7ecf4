// SHA-256 (FIPS 180-4), with the processor's own instructions where it has them.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>

namespace dit_runtime {

class Sha256 {
  public:
    void update(const unsigned char* bytes, std::size_t size);
    std::string hex();  // ends the message

    bool plain = false;  // for tests: never the processor's instructions

  private:
    void blocks(const unsigned char* bytes, std::size_t count);

    std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                           0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<unsigned char, 64> rest_ = {};
    std::uint64_t length_ = 0;
};

// The sum of a file, in hexadecimal.
std::string sha256(const std::filesystem::path& path);

}  // namespace dit_runtime
