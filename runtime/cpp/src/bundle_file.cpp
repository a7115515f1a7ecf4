#include "bundle_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "call.hpp"
#include "errors.hpp"
#include "manifest.hpp"
#include "sha256.hpp"

namespace dit_runtime {
namespace {

// The time of a change, in nanoseconds.
std::int64_t nanoseconds(const timespec& time) { return std::int64_t{time.tv_sec} * 1000000000 + time.tv_nsec; }

#ifdef __APPLE__
std::int64_t written(const struct stat& status) { return nanoseconds(status.st_mtimespec); }
std::int64_t changed(const struct stat& status) { return nanoseconds(status.st_ctimespec); }
#else
std::int64_t written(const struct stat& status) { return nanoseconds(status.st_mtim); }
std::int64_t changed(const struct stat& status) { return nanoseconds(status.st_ctim); }
#endif

}  // namespace

Mapping::Mapping(int descriptor, std::size_t size) : size_(size) {
    data_ = size ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0) : nullptr;
    if (data_ == MAP_FAILED) throw BundleError(text("a file cannot be mapped: ", std::strerror(errno)));
}

Mapping::~Mapping() {
    if (size_) munmap(data_, size_);
}

BundleFile::BundleFile(const Path& folder, const std::string& name) : where_(text(folder.string(), ": ", name)) {
    const std::vector<std::string> parts = parts_inside(folder, name);
    descriptor_ = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (std::size_t index = 0; descriptor_ >= 0 && index < parts.size(); ++index) {
        // Nonblocking, so that no pipe is waited for.
        const int flags = O_RDONLY | O_NOFOLLOW | O_CLOEXEC | (index + 1 == parts.size() ? O_NONBLOCK : O_DIRECTORY);
        const int next = openat(descriptor_, parts[index].c_str(), flags), failure = errno;
        close(descriptor_);
        descriptor_ = next;
        errno = failure;
    }
    if (descriptor_ < 0)
        throw BundleError(errno == ELOOP || errno == ENOTDIR
                              ? text(folder.string(), ": '", name, "' is a link; refused")
                              : text(where_, " cannot be opened: ", std::strerror(errno)));
    struct stat status{};
    const bool regular = fstat(descriptor_, &status) == 0 && S_ISREG(status.st_mode);
    if (!regular) {
        close(descriptor_);
        throw BundleError(where_ + " is no file");
    }
}

BundleFile::~BundleFile() { close(descriptor_); }

FileState BundleFile::state() const {
    struct stat status{};
    if (fstat(descriptor_, &status) != 0) throw BundleError(text(where_, ": ", std::strerror(errno)));
    return {static_cast<std::int64_t>(status.st_dev), static_cast<std::int64_t>(status.st_ino),
            static_cast<std::int64_t>(status.st_size), written(status), changed(status)};
}

std::size_t BundleFile::read_at(std::uintmax_t offset, void* to, std::size_t size) const {
    for (;;) {
        const ssize_t count = pread(descriptor_, to, size, static_cast<off_t>(offset));
        if (count >= 0) return static_cast<std::size_t>(count);
        if (errno != EINTR) throw BundleError(text(where_, " cannot be read to its end: ", std::strerror(errno)));
    }
}

std::vector<unsigned char> BundleFile::read(std::uintmax_t most) const {
    const std::uintmax_t length = size();
    if (length > most) throw BundleError(text(where_, " has ", length, " bytes; expected at most ", most));
    std::vector<unsigned char> content(static_cast<std::size_t>(length));
    for (std::size_t done = 0; done < content.size();) {
        const std::size_t part = read_at(done, content.data() + done, content.size() - done);
        if (!part) throw BundleError(where_ + " ends too early");
        done += part;
    }
    return content;
}

std::string BundleFile::sha256(const std::atomic<bool>& stop) const {
    Sha256 sum;
    std::vector<unsigned char> buffer(1 << 20);
    const std::uintmax_t length = size();  // of a file that grows, no more
    std::uintmax_t offset = 0;
    while (!stop && offset < length) {
        const std::size_t part = read_at(offset, buffer.data(), buffer.size());
        if (!part) break;
        sum.update(buffer.data(), part);
        offset += part;
        count_bytes(part);
    }
    return sum.hex();
}

bool is_trusted(const std::filesystem::path& folder) {
    struct stat status{};
    if (lstat(folder.c_str(), &status) != 0) return errno == ENOENT;
    return S_ISDIR(status.st_mode) && status.st_uid == geteuid() && !(status.st_mode & (S_IWGRP | S_IWOTH));
}

}  // namespace dit_runtime
