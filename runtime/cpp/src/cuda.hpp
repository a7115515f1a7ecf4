// The few calls of CUDA's runtime that an engine needs. Mirrors dit_runtime/backends/cuda.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <memory>
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

// Gives back what is a device's, where that is still there.
template <typename Call>
void give_back(int device, const Call& call) noexcept {
    try {
        const Device here(device);
        call();
    } catch (const CudaError&) {
    }
}

class Stream {
  public:
    Stream() {
        check(cudaGetDevice(&device_), "cudaGetDevice");
        check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    }
    ~Stream() {
        give_back(device_, [this] { cudaStreamDestroy(handle); });
    }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    void wait() const { check(cudaStreamSynchronize(handle), "cudaStreamSynchronize"); }
    void copy(void* target, const void* source, std::size_t bytes, cudaMemcpyKind kind) const {
        check(cudaMemcpyAsync(target, source, bytes, kind, handle), "cudaMemcpyAsync");
    }

    cudaStream_t handle = nullptr;

  private:
    int device_ = 0;
};

// Pinned memory of the host, as much as was asked for at once.
class Pinned {
  public:
    Pinned() = default;
    ~Pinned() { cudaFreeHost(host_); }
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;

    unsigned char* room(std::size_t bytes) {
        if (bytes > room_) {
            cudaFreeHost(std::exchange(host_, nullptr));
            room_ = 0;
            check(cudaMallocHost(&host_, bytes), "cudaMallocHost");
            room_ = bytes;
        }
        return static_cast<unsigned char*>(host_);
    }

  private:
    void* host_ = nullptr;
    std::size_t room_ = 0;  // bytes there
};

// Memory of the device, given back when nobody has it any more.
class Memory : public DeviceMemory {
  public:
    Memory(std::size_t bytes, int device, std::shared_ptr<Stream> stream)
        : device_(device), stream_(std::move(stream)) {
        check(cudaMalloc(&address_, bytes), "cudaMalloc");
    }
    ~Memory() override {
        give_back(device_, [this] {
            cudaFree(address_);  // which waits for what is queued
            staging_.reset();
        });
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void download(void* target, const std::vector<Stretch>& stretches) override {
        const Device here(device_);
        std::size_t bytes = 0;
        for (const Stretch& stretch : stretches) bytes += stretch.bytes;
        unsigned char* const host = staging().room(bytes);
        for (const Stretch& stretch : stretches)
            stream_->copy(host + stretch.place, at(stretch.start), stretch.bytes, cudaMemcpyDeviceToHost);
        stream_->wait();
        std::memcpy(target, host, bytes);
    }
    std::shared_ptr<void> stream() const override { return stream_; }

    void upload(const Input& values) {
        unsigned char* const host = staging().room(values.bytes());
        std::memcpy(host, values.data, values.bytes());
        stream_->copy(address_, host, values.bytes(), cudaMemcpyHostToDevice);
        stream_->wait();
        staging_.reset();  // a table goes up once
    }
    unsigned char* at(std::size_t start) const { return static_cast<unsigned char*>(address_) + start; }

  private:
    Pinned& staging() {
        if (!staging_) staging_ = std::make_unique<Pinned>();
        return *staging_;
    }

    const int device_;
    const std::shared_ptr<Stream> stream_;
    void* address_ = nullptr;
    std::unique_ptr<Pinned> staging_;
};

// What an engine reads or writes: memory of the device, which never moves, and pinned memory of the host for arrays
// that cross.
class Buffer {
  public:
    explicit Buffer(std::size_t bytes) : size(bytes) { check(cudaMalloc(&device, bytes), "cudaMalloc"); }
    ~Buffer() { cudaFree(device); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // Copies the values to here unless they are here already; no earlier copy from the host may be queued.
    void upload(const Input& input, const Stream& stream) {
        if (input.version && input.version == version_) return;
        if (input.bytes() > size)
            throw EngineError(text(input.name, " has ", input.bytes(), " bytes; expected at most ", size));
        version_ = 0;
        if (input.device) {
            for (const auto& [place, address, bytes] : addresses(*input.device))
                stream.copy(at(place), address, bytes, cudaMemcpyDeviceToDevice);
        } else {
            void* const host = pinned_.room(input.bytes());
            std::memcpy(host, input.data, input.bytes());
            stream.copy(device, host, input.bytes(), cudaMemcpyHostToDevice);
        }
        version_ = input.version;
    }

    // Returns the pinned memory, to be read when the stream is done.
    const float* download(std::size_t bytes, const Stream& stream) {
        unsigned char* const host = pinned_.room(bytes);
        stream.copy(host, device, bytes, cudaMemcpyDeviceToHost);
        return reinterpret_cast<const float*>(host);
    }

    // Copies what is here to these rows.
    void fill(const DeviceRows& rows, const Stream& stream) const {
        for (const auto& [place, address, bytes] : addresses(rows))
            stream.copy(address, at(place), bytes, cudaMemcpyDeviceToDevice);
    }

    const std::size_t size;
    void* device = nullptr;

  private:
    struct Place {
        std::size_t place;
        unsigned char* address;
        std::size_t bytes;
    };
    static std::vector<Place> addresses(const DeviceRows& rows) {
        const auto& memory = static_cast<const Memory&>(*rows.memory);  // of this stream, and so of this backend
        std::vector<Place> places;
        for (const Stretch& stretch : rows.stretches())
            places.push_back({stretch.place, memory.at(stretch.start), stretch.bytes});
        return places;
    }
    unsigned char* at(std::size_t place) const { return static_cast<unsigned char*>(device) + place; }

    Pinned pinned_;
    std::uint64_t version_ = 0;  // of the input that the device holds; 0: of none that is known
};

// An engine whose arrays stay on a device, and the stream that it works in: its own, or that of one which is open.
class DeviceEngine : public Resident {
  public:
    DeviceRows put(const Input& values) override {
        const Device here(number_);
        const auto memory = std::make_shared<Memory>(values.bytes(), number_, stream_);
        memory->upload(values);
        return DeviceRows::all(memory, values.shape, values.integers);
    }
    DeviceRows empty(const Shape& shape, bool integers) override {
        const Device here(number_);
        const std::size_t item = integers ? sizeof(std::int64_t) : sizeof(float);
        return DeviceRows::all(std::make_shared<Memory>(count(shape) * item, number_, stream_), shape, integers);
    }
    std::shared_ptr<void> stream() const override { return stream_; }

  protected:
    // On the current device.
    explicit DeviceEngine(const Options& options)
        : number_(gpu_number(options.device)),
          stream_(options.stream ? std::static_pointer_cast<Stream>(options.stream) : std::make_shared<Stream>()) {}

    // For what a run that failed has left, before memory of the host is written.
    void wait_for_host(const std::vector<Input>& inputs) const {
        for (const Input& input : inputs)
            if (!input.device) return stream_->wait();
    }
    static void require_shape(const std::string& name, const Shape& made, const DeviceRows& rows) {
        if (rows.shape() != made)
            throw EngineError(text(name, " has shape ", shown(made), ", expected ", shown(rows.shape())));
    }

    const int number_;
    std::shared_ptr<Stream> stream_;
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
