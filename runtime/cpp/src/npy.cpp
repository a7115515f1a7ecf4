#include "npy.hpp"

#include <algorithm>
#include <array>
#include <fstream>
#include <iterator>

#include "errors.hpp"

namespace dit_runtime {
namespace {

// Bounded access: what lies outside of the file is an error, never a read.
class Bytes {
  public:
    Bytes(const unsigned char* data, std::size_t size) : data_(data), size_(size) {}

    Bytes part(std::uint64_t first, std::uint64_t length) const {
        if (first > size_ || length > size_ - first) throw NpyError("it ends too early");
        return {data_ + first, static_cast<std::size_t>(length)};
    }
    std::uint32_t number(std::uint64_t first, int width) const {
        const Bytes bytes = part(first, static_cast<std::uint64_t>(width));
        std::uint32_t value = 0;
        for (int index = width; index-- > 0;) value = value << 8 | bytes.data_[index];
        return value;
    }
    std::string text() const { return {data_, data_ + size_}; }
    const unsigned char* data() const { return data_; }
    std::size_t size() const { return size_; }

  private:
    const unsigned char* data_;
    std::size_t size_;
};

constexpr std::uint32_t HEADER_MOST = 10000;  // as NumPy reads it

// The value after 'key': in the header, a Python literal.
std::string entry(const std::string& header, const std::string& key) {
    const std::size_t place = header.find("'" + key + "':");
    if (place == std::string::npos) throw NpyError("its header lacks " + key);
    return strip(header.substr(place + key.size() + 3));
}

NpyArray parse_array(const Bytes& file) {
    if (file.size() < 10 || file.part(0, 6).text() != "\x93NUMPY") throw NpyError("it is no .npy file");
    const std::uint32_t version = file.number(6, 2);  // the minor one in the second byte
    if (version != 1 && version != 2) throw NpyError("its version is not known; expected 1.0 or 2.0");
    const int width = version == 1 ? 2 : 4;
    const std::uint32_t length = file.number(8, width);
    if (length > HEADER_MOST) throw NpyError(text("its header has ", length, " bytes"));
    const std::string header = file.part(8u + static_cast<unsigned>(width), length).text();

    NpyArray array;
    const std::string descr = entry(header, "descr");
    array.kind = descr.size() > 4 ? descr.substr(2, 2) : "";
    const bool known = contains({"f2", "f4", "f8", "i4", "i8", "u1", "b1"}, array.kind) && descr[0] == '\'' &&
                       descr[4] == '\'' && (descr[1] == '<' || array.kind[1] == '1');
    if (!known)
        throw NpyError(
            text("its dtype is ", descr.substr(0, descr.find(',')), "; expected <f2, <f4, <f8, <i4, <i8, |u1, |b1"));
    if (entry(header, "fortran_order").rfind("False", 0) != 0)
        throw NpyError("it is in Fortran's order; expected C's: np.ascontiguousarray");
    const std::string shape = entry(header, "shape");
    if (shape.empty() || shape[0] != '(') throw NpyError("its shape is not understood");
    std::uint64_t bytes = static_cast<std::uint64_t>(array.kind[1] - '0');
    const std::uint64_t start = 8 + static_cast<std::uint64_t>(width) + length;
    for (std::size_t at = 1; at < shape.size() && shape[at] != ')';) {
        const std::size_t end = shape.find_first_not_of("0123456789", at);
        if (end == at || end == std::string::npos || end - at > 12) throw NpyError("its shape is not understood");
        const std::uint64_t size = std::stoull(shape.substr(at, end - at));
        if (size && bytes > file.size() / size) throw NpyError("it ends too early");
        bytes *= size;
        array.shape.push_back(static_cast<std::int64_t>(size));
        at = shape.find_first_not_of(", ", end);
        if (at == std::string::npos) throw NpyError("its shape is not understood");
    }
    const Bytes data = file.part(start, bytes);
    if (start + bytes != file.size()) throw NpyError(text("it has bytes after its ", bytes, " of numbers"));
    array.bytes.assign(data.data(), data.data() + data.size());
    return array;
}

// The checksum of a zip's entries (ISO 3309): the remainder of a polynomial, its lowest power in the highest bit.
std::uint32_t crc32(const Bytes& bytes) {
    static const std::array<std::uint32_t, 256> table = [] {
        std::array<std::uint32_t, 256> remainders{};
        for (std::uint32_t byte = 0; byte < 256; ++byte) {
            remainders[byte] = byte;
            for (int bit = 0; bit < 8; ++bit)
                remainders[byte] = remainders[byte] >> 1 ^ (remainders[byte] & 1 ? 0xEDB88320u : 0);
        }
        return remainders;
    }();
    std::uint32_t sum = ~0u;
    for (std::size_t at = 0; at < bytes.size(); ++at) sum = sum >> 8 ^ table[(sum ^ bytes.data()[at]) & 255];
    return ~sum;
}

}  // namespace

NpyArray parse_npy(const std::vector<unsigned char>& content) { return parse_array({content.data(), content.size()}); }

// PKWARE's APPNOTE: the end record (4.3.16) leads to the central directory (4.3.12), that to each file (4.3.7).
std::map<std::string, NpyArray> parse_npz(const std::vector<unsigned char>& content) {
    const Bytes file(content.data(), content.size());
    const std::size_t end = file.size() - std::min<std::size_t>(file.size(), 22);
    if (file.size() < 22 || file.number(end, 4) != 0x06054b50) throw NpyError("it is no .npz file, or has a comment");
    const std::uint32_t entries = file.number(end + 10, 2);
    std::uint64_t at = file.number(end + 16, 4);
    if (at + file.number(end + 12, 4) != end) throw NpyError("its directory is not where it ends");
    std::map<std::string, NpyArray> arrays;
    std::map<std::uint64_t, std::uint64_t> taken;  // the bytes of each file, first to past the last
    for (std::uint32_t index = 0; index < entries; ++index) {
        if (file.number(at, 4) != 0x02014b50) throw NpyError("its directory is damaged");
        const std::uint32_t method = file.number(at + 10, 2), stored = file.number(at + 20, 4);
        const std::uint32_t size = file.number(at + 24, 4), name_length = file.number(at + 28, 2);
        const std::uint64_t local = file.number(at + 42, 4);
        std::string name = file.part(at + 46, name_length).text();
        if (file.number(at + 8, 2) & 1) throw NpyError(name + " is encrypted");
        if (method != 0 || stored != size) throw NpyError(name + " is compressed; expected what np.savez writes");
        if (file.number(local, 4) != 0x04034b50) throw NpyError(name + " is not where the directory says");
        const std::uint64_t start = local + 30 + file.number(local + 26, 2) + file.number(local + 28, 2);
        const auto after = taken.emplace(local, start + size).first;
        const bool overlaps = (after != taken.begin() && std::prev(after)->second > local) ||
                              (std::next(after) != taken.end() && std::next(after)->first < start + size);
        if (overlaps || taken.size() != index + 1) throw NpyError(name + " shares its bytes with another entry");
        if (name.size() > 4 && name.compare(name.size() - 4, 4, ".npy") == 0) name.resize(name.size() - 4);
        const Bytes stored_file = file.part(start, size);
        if (crc32(stored_file) != file.number(at + 16, 4)) throw NpyError(name + " does not have its checksum");
        if (!arrays.emplace(name, parse_array(stored_file)).second) throw NpyError(name + " is in it more than once");
        at += 46 + name_length + file.number(at + 30, 2) + file.number(at + 32, 2);
    }
    return arrays;
}

std::vector<unsigned char> read_bytes(const std::filesystem::path& path, std::uintmax_t most) {
    std::error_code failure;
    const std::uintmax_t size = std::filesystem::file_size(path, failure);
    if (failure) throw NpyError("it cannot be read: " + failure.message());
    if (size > most) throw NpyError(text("it has ", size, " bytes; expected at most ", most));
    std::vector<unsigned char> content(static_cast<std::size_t>(size));
    std::ifstream file(path, std::ios::binary);
    if (!file.read(reinterpret_cast<char*>(content.data()), static_cast<std::streamsize>(size)))
        throw NpyError("it cannot be read");
    return content;
}

std::string npy_bytes(const std::string& dtype, const Shape& shape, const void* data, std::size_t bytes) {
    std::string sizes;
    for (const auto size : shape) sizes += std::to_string(size) + ", ";
    std::string header = "{'descr': '" + dtype + "', 'fortran_order': False, 'shape': (" + sizes + "), }";
    while ((10 + header.size() + 1) % 64) header += ' ';
    header += '\n';
    std::string file = "\x93NUMPY\x01";
    file += '\0';
    file += static_cast<char>(header.size() & 0xFF);
    file += static_cast<char>(header.size() >> 8);
    return file + header + std::string(static_cast<const char*>(data), bytes);
}

}  // namespace dit_runtime
