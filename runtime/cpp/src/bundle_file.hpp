// The files of a bundle by descriptor: what is put in a file's place later changes nothing of what was opened.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace dit_runtime {

// Numbers that change when a file is written, or another is put in its place: device, inode, size, times.
using FileState = std::array<std::int64_t, 5>;

// A file's content in memory, of which only what is looked at is read.
class Mapping {
  public:
    Mapping(int descriptor, std::size_t size);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    std::string_view bytes() const { return {static_cast<const char*>(data_), size_}; }

  private:
    void* data_ = nullptr;
    std::size_t size_;
};

// A regular file that is open to read. No link below the folder is followed.
class BundleFile {
  public:
    BundleFile(const std::filesystem::path& folder, const std::string& name);
    ~BundleFile();
    BundleFile(const BundleFile&) = delete;
    BundleFile& operator=(const BundleFile&) = delete;

    FileState state() const;
    std::uintmax_t size() const { return static_cast<std::uintmax_t>(state()[2]); }
    Mapping map() const { return {descriptor_, static_cast<std::size_t>(size())}; }
    std::vector<unsigned char> read(std::uintmax_t most) const;  // refuses a larger file
    // In hexadecimal; what it returns once `stop` is true is no sum. Its bytes count as the call's progress.
    std::string sha256(const std::atomic<bool>& stop) const;

  private:
    std::size_t read_at(std::uintmax_t offset, void* to, std::size_t size) const;

    const std::string where_;  // for messages
    int descriptor_ = -1;
};

// Whether nobody but the user can write into the folder, or it is not there.
bool is_trusted(const std::filesystem::path& folder);

}  // namespace dit_runtime
