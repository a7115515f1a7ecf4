// The parts of TensorRT's engine without a state: the logger, the GPU here, shapes, and the file of RTX's kernels.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "cuda.hpp"
#include "npy.hpp"

namespace dit_runtime::trt {

// Keeps the last error for our own message; the rest is not ours to print.
class Logger : public nvinfer1::ILogger {
  public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            const std::lock_guard<std::mutex> lock(mutex_);
            last_ = first_line(message);
        } catch (...) {  // no memory for it: the one before stays
        }
    }

    std::string last() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return last_.empty() ? "it does not say why" : last_;
    }

    void clear() {
        const std::lock_guard<std::mutex> lock(mutex_);
        last_.clear();
    }

  private:
    mutable std::mutex mutex_;
    std::string last_;
};

// TensorRT keeps the first logger that a process gives it: one for all engines, never destroyed.
inline Logger& logger() {
    static Logger* const logger = new Logger;
    return *logger;
}

// The driver and the GPU here; one that a failed call leaves unset makes `refusal` name it.
inline Gpu gpu(int device) {
    Gpu here;
    here.version = trt_version();
    if (cudaDriverGetVersion(&here.driver) != cudaSuccess) here.driver = 0;
    int count = 0, major = 0, minor = 0;
    if (!here.driver || cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return here;
    if (device >= count)
        throw NoDevice(text("device 'cuda:", device, "' is not here; expected cuda:0 to cuda:", count - 1));
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
        here.capability = text(major, ".", minor);
    return here;
}

inline Shape shape_of(const nvinfer1::Dims& sizes) { return {sizes.d, sizes.d + std::max(sizes.nbDims, 0)}; }

inline bool contains_negative(const Shape& shape) {
    return std::any_of(shape.begin(), shape.end(), [](std::int64_t size) { return size < 0; });
}

inline nvinfer1::Dims dims(const Shape& shape) {
    nvinfer1::Dims sizes{};
    sizes.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), sizes.d);
    return sizes;
}

// The kernels that were compiled for this GPU before; none where they cannot be read.
inline std::vector<unsigned char> read_kernels(const Path& path) {
    try {
        return read_bytes(path);
    } catch (const NpyError&) {
        return {};
    }
}

// Writes what was compiled for this GPU, for the next one that opens this engine.
inline void write_kernels(const Path& path, const void* data, std::size_t size) {
    std::error_code failure;
    if (std::filesystem::create_directories(path.parent_path(), failure))
        std::filesystem::permissions(path.parent_path(), std::filesystem::perms::owner_all, failure);
    Path part = path;
    part += text(".", std::random_device{}());  // another process may write its own
    std::ofstream file(part, std::ios::binary);
    file.write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
    file.close();
    if (file) std::filesystem::rename(part, path, failure);
    if (!file || failure) std::filesystem::remove(part, failure);  // a disk may be full
}

}  // namespace dit_runtime::trt
