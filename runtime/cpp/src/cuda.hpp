// The few calls of CUDA's runtime that an engine needs. Mirrors dit_runtime/backends/cuda.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <utility>

#include "engine.hpp"
#include "errors.hpp"

namespace dit_runtime::cuda {

// A call that failed; its message is CUDA's own name for why.
struct CudaError : EngineError {
    using EngineError::EngineError;
};

inline void check(cudaError_t status, const char* name) {
    if (status != cudaSuccess) throw CudaError(text(name, ": ", cudaGetErrorName(status)));
}

// The thread's current device while this lives; the caller's own comes back after it.
class Device {
  public:
    explicit Device(int number) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(number), "cudaSetDevice");
    }
    ~Device() { cudaSetDevice(before_); }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

  private:
    int before_ = 0;
};

class Stream {
  public:
    Stream() { check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
    ~Stream() { cudaStreamDestroy(handle); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    void wait() const { check(cudaStreamSynchronize(handle), "cudaStreamSynchronize"); }

    cudaStream_t handle = nullptr;
};

// Memory of the device, which never moves, and pinned memory of the host through which arrays cross.
class Buffer {
  public:
    explicit Buffer(std::size_t bytes) : size(bytes) { check(cudaMalloc(&device, bytes), "cudaMalloc"); }
    ~Buffer() {
        cudaFree(device);
        cudaFreeHost(host_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // Copies the values to here unless they are here already; no earlier copy of this buffer may be queued.
    void upload(const Input& input, const Stream& stream) {
        if (input.version && input.version == version_) return;
        if (input.bytes() > size)
            throw EngineError(text(input.name, " has ", input.bytes(), " bytes; expected at most ", size));
        version_ = 0;
        void* const host = pinned(input.bytes());
        std::memcpy(host, input.data, input.bytes());
        check(cudaMemcpyAsync(device, host, input.bytes(), cudaMemcpyHostToDevice, stream.handle), "cudaMemcpyAsync");
        version_ = input.version;
    }

    // Returns the pinned memory, to be read when the stream is done.
    const float* download(std::size_t bytes, const Stream& stream) {
        void* const host = pinned(bytes);
        check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream.handle), "cudaMemcpyAsync");
        return static_cast<const float*>(host);
    }

    const std::size_t size;
    void* device = nullptr;

  private:
    // As much as has crossed at once: the largest shape may never come.
    void* pinned(std::size_t bytes) {
        if (bytes > room_) {
            cudaFreeHost(std::exchange(host_, nullptr));
            room_ = 0;
            check(cudaMallocHost(&host_, bytes), "cudaMallocHost");
            room_ = bytes;
        }
        return host_;
    }

    void* host_ = nullptr;
    std::size_t room_ = 0;       // bytes there
    std::uint64_t version_ = 0;  // of the input that the device holds; 0: of none that is known
};

// Work of a stream as a CUDA graph.
class Recording {
  public:
    template <typename Work>
    Recording(const Stream& stream, const Work& work) : stream_(stream) {
        check(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
        cudaGraph_t graph = nullptr;
        try {
            work();
        } catch (...) {
            cudaStreamEndCapture(stream.handle, &graph);
            cudaGraphDestroy(graph);
            throw;
        }
        check(cudaStreamEndCapture(stream.handle, &graph), "cudaStreamEndCapture");
        const cudaError_t status = cudaGraphInstantiate(&graph_, graph, 0);
        cudaGraphDestroy(graph);
        check(status, "cudaGraphInstantiate");
    }
    ~Recording() { cudaGraphExecDestroy(graph_); }
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;

    void launch() const { check(cudaGraphLaunch(graph_, stream_.handle), "cudaGraphLaunch"); }

  private:
    const Stream& stream_;
    cudaGraphExec_t graph_ = nullptr;
};

}  // namespace dit_runtime::cuda
