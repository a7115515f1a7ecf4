// Archives of NumPy's, made and damaged by hand.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// ISO 3309, a bit at a time.
inline std::uint32_t checksum(const std::string& bytes) {
    std::uint32_t sum = ~0u;
    for (const char byte : bytes) {
        sum ^= static_cast<unsigned char>(byte);
        for (int bit = 0; bit < 8; ++bit) sum = sum >> 1 ^ (sum & 1 ? 0xEDB88320u : 0);
    }
    return ~sum;
}

inline std::string little(std::uint64_t value, int width) {
    std::string bytes;
    for (int index = 0; index < width; ++index) bytes += static_cast<char>(value >> (8 * index));
    return bytes;
}

inline std::uint64_t number_at(const std::string& bytes, std::size_t at, int width) {
    std::uint64_t value = 0;
    for (int index = width; index-- > 0;)
        value = value << 8 | static_cast<unsigned char>(bytes.at(at + static_cast<std::size_t>(index)));
    return value;
}

// An archive of these files, stored. Entries of `again` come a second time in the directory.
inline std::string npz_of(const std::vector<std::pair<std::string, std::string>>& files,
                          const std::vector<std::size_t>& again = {}) {
    std::string bytes;
    std::vector<std::string> entries;
    for (const auto& [name, content] : files) {
        const std::string common = little(20, 2) + std::string(4, '\0') + little(0, 2) + little(0x21, 2) +
                                   little(checksum(content), 4) + little(content.size(), 4) +
                                   little(content.size(), 4) + little(name.size(), 2) + little(0, 2);
        entries.push_back(little(0x02014b50, 4) + little(20, 2) + common + std::string(10, '\0') +
                          little(bytes.size(), 4) + name);
        bytes += little(0x04034b50, 4) + common + name + content;
    }
    std::string directory;
    for (const std::string& entry : entries) directory += entry;
    for (const std::size_t index : again) directory += entries.at(index);
    const std::size_t count = entries.size() + again.size();
    return bytes + directory + little(0x06054b50, 4) + little(0, 4) + little(count, 2) + little(count, 2) +
           little(directory.size(), 4) + little(bytes.size(), 4) + little(0, 2);
}

// Gives each file of an archive the checksum of what it now holds.
inline void seal_npz(std::string& bytes) {
    const std::size_t end = bytes.size() - 22;
    std::size_t at = number_at(bytes, end + 16, 4);
    for (std::size_t left = number_at(bytes, end + 10, 2); left; --left) {
        const std::size_t local = number_at(bytes, at + 42, 4), size = number_at(bytes, at + 24, 4);
        const std::size_t start = local + 30 + number_at(bytes, local + 26, 2) + number_at(bytes, local + 28, 2);
        bytes.replace(at + 16, 4, little(checksum(bytes.substr(start, size)), 4));
        at += 46 + number_at(bytes, at + 28, 2) + number_at(bytes, at + 30, 2) + number_at(bytes, at + 32, 2);
    }
}
