// TensorRT and TensorRT-RTX, whose runtimes have one API: opens an engine file that was made on or for this GPU.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <mutex>

#include "engine.hpp"
#include "errors.hpp"
#include "npy.hpp"

namespace dit_runtime {
namespace {

void check(cudaError_t status) {
    if (status != cudaSuccess) throw EngineError(text("CUDA: ", cudaGetErrorString(status)));
}

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
Logger& logger() {
    static Logger* const logger = new Logger;
    return *logger;
}

// Memory of the device that grows as it is needed.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { cudaFree(data_); }

    void* room(std::size_t bytes) {
        if (bytes > size_) {
            check(cudaFree(data_));
            data_ = nullptr;
            size_ = 0;
            check(cudaMalloc(&data_, bytes));
            size_ = bytes;
        }
        return data_;
    }

  private:
    void* data_ = nullptr;
    std::size_t size_ = 0;
};

class Stream {
  public:
    Stream() { check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
    ~Stream() { cudaStreamDestroy(stream); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    cudaStream_t stream = nullptr;
};

// The driver and the GPU here; one that a failed call leaves unset makes `refusal` name it.
Gpu gpu(int device) {
    Gpu here;
    here.version = trt_version();
    if (cudaDriverGetVersion(&here.driver) != cudaSuccess) here.driver = 0;
    int count = 0, major = 0, minor = 0;
    if (!here.driver || cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return here;
    if (device >= count)
        throw UsageError(text("device 'cuda:", device, "' is not here; expected cuda:0 to cuda:", count - 1));
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
        here.capability = text(major, ".", minor);
    return here;
}

class TrtEngine : public Engine {
  public:
    TrtEngine(const std::vector<Path>& files, const Stage& stage, const Options& options)
        : device_(gpu_number(options.device)) {
        logger().clear();  // what another engine did is not why this one fails
        const Path& path = files.at(0);
        if (options.threads)
            throw UsageError(text("threads is an option of the CPU's backends; this stage runs on ", DIT_TENSORRT));
        const auto own = stage.built.find(DIT_TENSORRT);
        const Built built = own == stage.built.end() ? Built{} : own->second;
        const std::string reason = refusal(DIT_TENSORRT, built, gpu(device_));
        const std::string command = text("; on the target, make it with: dit-run compile ", path.parent_path().string(),
                                         " --backend ", DIT_TENSORRT);
        if (!reason.empty()) throw BundleError(text(path.string(), ": cannot run here: ", reason, command));
        if (files.size() > 1)  // its weights are in the ONNX form
            throw BundleError(text(path.string(), ": built with --strip-plan, which libdit does not refit", command));
        check(cudaSetDevice(device_));
        stream_ = std::make_unique<Stream>();
        runtime_.reset(nvinfer1::createInferRuntime(logger()));
        if (!runtime_) throw UsageError(text(DIT_TENSORRT, " does not start here: ", logger().last()));
        if (built.version_compatible)
            runtime_->setEngineHostCodeAllowed(true);  // such a plan brings its runtime; its sha256 has been checked
        const std::vector<unsigned char> content = read_bytes(path, UINTMAX_MAX);
        engine_.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
        if (engine_ && built.weight_streaming && engine_->getStreamableWeightsSize() > 0)
            engine_->setWeightStreamingBudgetV2(engine_->getWeightStreamingAutomaticBudget());
        const std::int32_t profiles = engine_ ? engine_->getNbOptimizationProfiles() : 0;
        for (std::int32_t profile = 0; profile < profiles; ++profile) {
            contexts_.emplace_back(engine_->createExecutionContext());
            if (!contexts_.back() || !contexts_.back()->setOptimizationProfileAsync(profile, stream_->stream)) {
                contexts_.clear();
                break;
            }
        }
        check(cudaStreamSynchronize(stream_->stream));
        if (contexts_.empty())
            throw BundleError(text(path.string(), ": ", DIT_TENSORRT, " does not open it: ", logger().last(), command));
        for (std::int32_t index = 0; index < engine_->getNbIOTensors(); ++index) {
            const std::string name = engine_->getIOTensorName(index);
            const bool in = engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
            (in ? inputs : outputs).push_back(name);
        }
    }

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        check(cudaSetDevice(device_));  // a pipeline may move between threads
        nvinfer1::IExecutionContext& context = fitting(arrays);
        for (const Input& input : arrays) {
            const auto type = input.integers ? nvinfer1::DataType::kINT64 : nvinfer1::DataType::kFLOAT;
            require_type(input.name, type);
            const std::size_t bytes = count(input.shape) * (input.integers ? sizeof(std::int64_t) : sizeof(float));
            void* room = buffers_[input.name].room(bytes);
            check(cudaMemcpyAsync(room, input.data, bytes, cudaMemcpyHostToDevice, stream_->stream));
            require(context.setInputShape(input.name.c_str(), dims(input.shape)), input.name);
            require(context.setTensorAddress(input.name.c_str(), room), input.name);
        }
        std::map<std::string, Output> named;
        for (const auto& name : outputs) {
            require_type(name, nvinfer1::DataType::kFLOAT);
            const nvinfer1::Dims sizes = context.getTensorShape(name.c_str());
            require(sizes.nbDims >= 0, name);
            Output& output = named[name];
            for (std::int32_t axis = 0; axis < sizes.nbDims; ++axis) {
                require(sizes.d[axis] >= 0, name);
                output.shape.push_back(sizes.d[axis]);
            }
            output.values.resize(count(output.shape));
            void* room = buffers_[name].room(output.values.size() * sizeof(float));
            require(context.setTensorAddress(name.c_str(), room), name);
        }
        require(context.enqueueV3(stream_->stream), "the run");
        for (auto& [name, output] : named)
            check(cudaMemcpyAsync(output.values.data(), buffers_[name].room(0), output.values.size() * sizeof(float),
                                  cudaMemcpyDeviceToHost, stream_->stream));
        check(cudaStreamSynchronize(stream_->stream));
        return named;
    }

  private:
    // The context of the profile that takes these shapes: one with guidance, one without.
    nvinfer1::IExecutionContext& fitting(const std::vector<Input>& arrays) const {
        using nvinfer1::OptProfileSelector;
        for (std::size_t profile = 0; profile < contexts_.size(); ++profile) {
            bool fits = true;
            for (const Input& input : arrays) {
                const auto bound = [&](OptProfileSelector end) {
                    return engine_->getProfileShape(input.name.c_str(), static_cast<std::int32_t>(profile), end);
                };
                const nvinfer1::Dims least = bound(OptProfileSelector::kMIN), most = bound(OptProfileSelector::kMAX);
                fits = fits && least.nbDims == static_cast<std::int32_t>(input.shape.size());
                for (std::size_t axis = 0; fits && axis < input.shape.size(); ++axis)
                    fits = least.d[axis] <= input.shape[axis] && input.shape[axis] <= most.d[axis];
            }
            if (fits) return *contexts_[profile];
        }
        throw EngineError(text("no profile of this engine takes ", arrays.empty() ? "" : shown(arrays[0].shape),
                               "; rebuild it with a larger --max-batch"));
    }

    static nvinfer1::Dims dims(const Shape& shape) {
        nvinfer1::Dims sizes{};
        sizes.nbDims = static_cast<std::int32_t>(shape.size());
        for (std::size_t axis = 0; axis < shape.size(); ++axis) sizes.d[axis] = shape[axis];
        return sizes;
    }

    void require(bool fine, const std::string& what) const {
        if (!fine) throw EngineError(text(DIT_TENSORRT, " refuses ", what, ": ", logger().last()));
    }

    void require_type(const std::string& name, nvinfer1::DataType type) const {
        if (engine_->getTensorDataType(name.c_str()) != type)
            throw EngineError(text(name, " has another type in this engine than in the bundle's signature"));
    }

    const int device_;
    // In the order of their needs: what is named first is destroyed last.
    std::unique_ptr<Stream> stream_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;  // by profile
    std::map<std::string, Buffer> buffers_;
};

}  // namespace

// The version of the loaded library, which may be newer than the headers.
std::string trt_version() {
    return text(getInferLibMajorVersion(), ".", getInferLibMinorVersion(), ".", getInferLibPatchVersion());
}

std::unique_ptr<Engine> open_trt(const std::vector<Path>& files, const Stage& stage, const Options& options) {
    try {
        return std::make_unique<TrtEngine>(files, stage, options);
    } catch (const NpyError& error) {
        throw BundleError(text(files.at(0).string(), ": ", error.what()));
    }
}

}  // namespace dit_runtime
