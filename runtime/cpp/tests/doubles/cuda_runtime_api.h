// A CUDA runtime that is not here, as far as it is used: memory is the host's, and what a stream is given waits until
// somebody waits for the stream. Mirrors tests/tensorrt/fake_cuda.py.
#pragma once

#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <stdexcept>
#include <utility>
#include <vector>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidDevice = 101,
    cudaErrorInvalidValue = 1,
    cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
constexpr unsigned cudaStreamNonBlocking = 1;

using Work = std::function<void()>;
struct Queue {
    int device;
    std::vector<Work> queued, recorded;
    bool records = false;
};
using cudaStream_t = Queue*;
using cudaGraph_t = std::vector<Work>*;
using cudaGraphExec_t = std::vector<Work>*;

// What is open, and what was done.
struct CudaDouble {
    struct Block {
        std::size_t bytes;
        bool pinned;
        int device;
    };
    struct Copy {
        cudaMemcpyKind kind;
        std::size_t bytes;
    };
    int devices = 2, driver = 13020;
    bool captures = true;
    int room = -1;                  // for so many allocations more; less than 0: for any number
    std::map<void*, Block> memory;  // that is open
    std::map<void*, int> objects;   // streams and graphs that are open, by device
    std::vector<Copy> copies;       // in their order
    int pageable = 0;               // of these, from or into memory that is not pinned
    int foreign = 0;                // calls for a thing of one device while another was current
    int instantiated = 0, launches = 0;

    bool pinned(const void* place) const;
    void own(int device);
    void finish(cudaStream_t stream);
    static CudaDouble& here() {
        static CudaDouble cuda;
        return cuda;
    }
    static int& current() {
        static thread_local int device = 0;
        return device;
    }
};

// Whether it lies in pinned memory.
inline bool CudaDouble::pinned(const void* place) const {
    const auto next = memory.upper_bound(const_cast<void*>(place));
    if (next == memory.begin()) return false;
    const auto& [begin, block] = *std::prev(next);
    return block.pinned && static_cast<const char*>(place) < static_cast<const char*>(begin) + block.bytes;
}

inline void CudaDouble::own(int device) { foreign += device != current(); }

inline void CudaDouble::finish(cudaStream_t stream) {
    if (stream->records) throw std::logic_error("nobody may wait for a stream that is recorded");
    const std::vector<Work> works = std::exchange(stream->queued, {});
    for (const Work& work : works) work();
}

inline void later(cudaStream_t stream, Work work) {
    (stream->records ? stream->recorded : stream->queued).push_back(std::move(work));
}

inline const char* cudaGetErrorName(cudaError_t status) {
    return status == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation"
           : status == cudaErrorInvalidDevice  ? "cudaErrorInvalidDevice"
                                               : "cudaErrorOfTheDouble";
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CudaDouble::here().driver, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = CudaDouble::here().devices, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = CudaDouble::current(), cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
    if (device >= CudaDouble::here().devices) return cudaErrorInvalidDevice;
    return CudaDouble::current() = device, cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    return *value = attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 9, cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new Queue{CudaDouble::current(), {}, {}};
    CudaDouble::here().objects[*stream] = CudaDouble::current();
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    CudaDouble::here().own(stream->device);
    return CudaDouble::here().finish(stream), cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!stream) return cudaErrorInvalidValue;
    CudaDouble::here().own(stream->device);
    CudaDouble::here().finish(stream);
    CudaDouble::here().objects.erase(stream);
    delete stream;
    return cudaSuccess;
}

inline cudaError_t allocate(void** data, std::size_t bytes, bool pinned) {
    CudaDouble& cuda = CudaDouble::here();
    if (!cuda.room) return cudaErrorMemoryAllocation;
    if (cuda.room > 0) --cuda.room;
    *data = std::calloc(1, bytes);
    cuda.memory[*data] = {bytes, pinned, CudaDouble::current()};
    return cudaSuccess;
}
// Frees after all queued work, as CUDA does.
inline cudaError_t release(void* data) {
    CudaDouble& cuda = CudaDouble::here();
    if (!data) return cudaSuccess;
    cuda.own(cuda.memory.at(data).device);
    for (const auto& [object, device] : cuda.objects)
        if (device >= 0) cuda.finish(static_cast<cudaStream_t>(object));
    cuda.memory.erase(data);
    std::free(data);
    return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** data, std::size_t bytes) { return allocate(data, bytes, false); }
inline cudaError_t cudaMallocHost(void** data, std::size_t bytes) { return allocate(data, bytes, true); }
inline cudaError_t cudaFree(void* data) { return release(data); }
inline cudaError_t cudaFreeHost(void* data) { return release(data); }
inline cudaError_t cudaMemcpyAsync(void* into, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream) {
    CudaDouble& cuda = CudaDouble::here();
    cuda.own(stream->device);
    cuda.copies.push_back({kind, bytes});
    cuda.pageable += kind != cudaMemcpyDeviceToDevice && !cuda.pinned(kind == cudaMemcpyHostToDevice ? from : into);
    later(stream, [=] { std::memcpy(into, from, bytes); });
    return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    return stream->records = CudaDouble::here().captures,
           stream->records ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = new std::vector<Work>(std::exchange(stream->recorded, {}));
    CudaDouble::here().objects[*graph] = -1;
    return stream->records = false, cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
    *made = new std::vector<Work>(*graph);
    CudaDouble::here().objects[*made] = -1;
    return ++CudaDouble::here().instantiated, cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    for (const Work& work : *graph) later(stream, work);
    return ++CudaDouble::here().launches, cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return CudaDouble::here().objects.erase(graph), delete graph, cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaGraphDestroy(graph); }
