// TensorRT and TensorRT-RTX, whose runtimes have one API: opens an engine file that was made on or for this GPU.
// Mirrors dit_runtime/backends/trt_engine.py.
#include "trt.hpp"

#include <algorithm>

#include "cuda.hpp"
#include "npy.hpp"
#include "sha256.hpp"

namespace dit_runtime {
namespace {

using cuda::Buffer;
using cuda::Device;
using cuda::Recording;

constexpr const char* KERNELS = ".kernels.bin";  // TensorRT-RTX's runtime cache
constexpr std::size_t SHAPES = 16;  // the last used ones, which keep their contexts: two profiles of eight batch sizes
constexpr auto OWNED = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;

// A context of one shape, and its CUDA graph.
//
// A graph holds while nothing changes in the context that it was captured from. So each shape has a context, and is
// captured once; all contexts share the memory of their activations, for one stream runs them in turn.
struct Execution {
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    std::map<std::string, Shape> outputs;
    bool ran = false;
    std::unique_ptr<Recording> recording = nullptr;
    std::uint64_t used = 0;  // the last run's number
};

// The contexts of an engine by shape, the buffers that they are bound to, and the stream that they run in.
class TrtEngine : public cuda::DeviceEngine, public Engine {
  public:
    TrtEngine(const std::vector<Path>& files, const Built& built, const Options& options, const std::string& command)
        : DeviceEngine(options), log_(options.log) {
        const Path& path = files.at(0);
        runtime_.reset(nvinfer1::createInferRuntime(trt::logger()));
        if (!runtime_) throw NoDevice(text(DIT_TENSORRT, " does not start here: ", trt::logger().last()));
        if (built.version_compatible)
            runtime_->setEngineHostCodeAllowed(true);  // such a plan brings its runtime; its sha256 has been checked
        const std::vector<unsigned char> content = read_bytes(path, UINTMAX_MAX);
        Sha256 sum;  // of what is executed, whatever the file has become
        sum.update(content.data(), content.size());
        if (!options.engine_sha256.empty() && sum.hex() != options.engine_sha256)
            throw BundleError(path.string() + ": does not have the sha256 of its manifest; refused");
        engine_.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
        if (!engine_)
            throw BundleError(
                text(path.string(), ": ", DIT_TENSORRT, " does not open it: ", trt::logger().last(), command));
        if (built.weight_streaming && engine_->getStreamableWeightsSize() > 0)
            engine_->setWeightStreamingBudgetV2(engine_->getWeightStreamingAutomaticBudget());
        records_ = CAPTURES && !built.weight_streaming;  // each run then waits for weights, which no CUDA graph can
        for (std::int32_t index = 0; index < engine_->getNbIOTensors(); ++index) {
            const std::string name = engine_->getIOTensorName(index);
            const bool in = engine_->getTensorIOMode(name.c_str()) == nvinfer1::TensorIOMode::kINPUT;
            (in ? inputs : outputs).push_back(name);
        }
        if (!options.cache.empty()) kernels_ = options.cache / (path.stem().string() + KERNELS);
        const std::int64_t size = std::max<std::int64_t>(1, engine_->getDeviceMemorySizeV2());
        activations_ = std::make_unique<Buffer>(static_cast<std::size_t>(size));
        allocate();
        for (auto& [shapes, execution] : executions_) bind(*execution.context);
    }

    ~TrtEngine() override {
        try {
            const Device here(number_);
            stream_->wait();
            keep_kernels();
            close();
        } catch (...) {  // the device is gone, or the kernels cannot be kept; that would only save time
            close();
        }
    }

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        const Device here(number_);  // a pipeline may move between threads
        stream_->wait();             // for what a run that failed has left
        Execution& execution = prepare(arrays);
        upload(arrays);
        enqueue(execution);
        std::map<std::string, const float*> views;
        for (const auto& [name, shape] : execution.outputs)
            views[name] = buffers_.at(name).download(count(shape) * sizeof(float), *stream_);
        stream_->wait();
        std::map<std::string, Output> named;
        for (const auto& [name, shape] : execution.outputs)
            named[name] = {shape, {views[name], views[name] + count(shape)}};
        return named;
    }

    void run_into(const std::vector<Input>& arrays, const Into& into) override {
        const Device here(number_);
        wait_for_host(arrays);
        Execution& execution = prepare(arrays);
        for (const auto& [name, rows] : into) require_shape(name, execution.outputs.at(name), rows);
        upload(arrays);
        enqueue(execution);
        for (const auto& [name, rows] : into) buffers_.at(name).fill(rows, *stream_);
    }

  private:
    void upload(const std::vector<Input>& arrays) {
        for (const Input& input : arrays) {
            if (is_integer(input.name) != input.integers)
                throw EngineError(text(input.name, " has another type in this engine than in the bundle's signature"));
            buffers_.at(input.name).upload(input, *stream_);
        }
    }

    // The execution of these arrays' shapes; a new one takes the place of the one not used for longest.
    Execution& prepare(const std::vector<Input>& arrays) {
        std::map<std::string, Shape> shapes_by_name;
        for (const Input& input : arrays) shapes_by_name[input.name] = input.shape;
        std::vector<Shape> shapes;
        for (const auto& name : inputs) shapes.push_back(shapes_by_name.at(name));
        if (!executions_.count(shapes)) {
            if (executions_.size() >= SHAPES) {
                stream_->wait();  // for what is queued there
                executions_.erase(std::min_element(
                    executions_.begin(), executions_.end(),
                    [](const auto& one, const auto& other) { return one.second.used < other.second.used; }));
            }
            Execution made = this->execution(profile(shapes), shapes);
            bind(*made.context);
            executions_.emplace(shapes, std::move(made));
        }
        Execution& execution = executions_.at(shapes);
        execution.used = ++runs_;
        return execution;
    }

    // The profile that takes these shapes: one with guidance, one without.
    std::int32_t profile(const std::vector<Shape>& shapes) const {
        using nvinfer1::OptProfileSelector;
        for (std::int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile) {
            bool fits = true;
            for (std::size_t index = 0; index < shapes.size(); ++index) {
                const Shape least = bound(inputs[index], profile, OptProfileSelector::kMIN);
                const Shape most = bound(inputs[index], profile, OptProfileSelector::kMAX);
                fits = fits && least.size() == shapes[index].size();
                for (std::size_t axis = 0; fits && axis < least.size(); ++axis)
                    fits = least[axis] <= shapes[index][axis] && shapes[index][axis] <= most[axis];
            }
            if (fits) return profile;
        }
        std::vector<std::string> asked;
        for (std::size_t index = 0; index < shapes.size(); ++index)
            asked.push_back(inputs[index] + " " + shown(shapes[index]));
        throw UsageError(
            text("no profile of this engine takes ", join(asked), "; rebuild it with a larger --max-batch"));
    }

    // Replays the recording; the first run of a shape sets everything up, the second is recorded.
    void enqueue(Execution& execution) {
        if (execution.recording) return execution.recording->launch();
        execute(*execution.context);
        if (records_ && execution.ran) record(execution);
        execution.ran = true;
    }

    void record(Execution& execution) {
        stream_->wait();
        try {
            execution.recording = std::make_unique<Recording>(*stream_, [&] { execute(*execution.context); });
        } catch (const EngineError& error) {
            log_(Severity::WARNING,
                 text("no CUDA graph of ", DIT_TENSORRT, "'s work, it runs without: ", error.what()));
            records_ = false;
        }
    }

    void execute(nvinfer1::IExecutionContext& context) const {
        if (!context.enqueueV3(stream_->handle))
            throw EngineError(text(DIT_TENSORRT, " does not run: ", trt::logger().last()));
    }

    // Makes a context of a profile for these shapes; nothing is bound to it yet.
    Execution execution(std::int32_t profile, const std::vector<Shape>& shapes) {
        std::unique_ptr<nvinfer1::IExecutionContext> context = create_context();
        if (!context) throw UsageError(text(DIT_TENSORRT, " has no memory for this engine: ", trt::logger().last()));
        context->setNvtxVerbosity(nvinfer1::ProfilingVerbosity::kNONE);  // the build's detail makes each run slower
        if (!context->setOptimizationProfileAsync(profile, stream_->handle))
            throw EngineError(text(DIT_TENSORRT, " does not set profile ", profile, ": ", trt::logger().last()));
        stream_->wait();
        for (std::size_t index = 0; index < shapes.size(); ++index)
            if (!context->setInputShape(inputs[index].c_str(), trt::dims(shapes[index])))
                throw EngineError(text(DIT_TENSORRT, " does not take ", inputs[index], " ", shown(shapes[index]), ": ",
                                       trt::logger().last()));
        context->setDeviceMemoryV2(activations_->device, static_cast<std::int64_t>(activations_->size));
        std::map<std::string, Shape> made;
        for (const auto& name : outputs) {
            const nvinfer1::Dims sizes = context->getTensorShape(name.c_str());
            made[name] = trt::shape_of(sizes);
            if (sizes.nbDims < 0 || trt::contains_negative(made[name]))
                throw EngineError(text(DIT_TENSORRT, " does not know the shape of ", name, ": ", trt::logger().last()));
        }
        return {std::move(context), std::move(made)};
    }

#ifdef TRT_MAJOR_RTX
    static constexpr bool CAPTURES = false;  // it captures graphs by itself

    void keep_kernels() const {
        const std::unique_ptr<nvinfer1::IHostMemory> content(kernels_.empty() ? nullptr : runtime_cache_->serialize());
        if (content && content->size()) trt::write_kernels(kernels_, content->data(), content->size());
    }

    std::unique_ptr<nvinfer1::IExecutionContext> create_context() {
        if (!settings_) {
            settings_.reset(engine_->createRuntimeConfig());
            if (!settings_)
                throw UsageError(text(DIT_TENSORRT, " has no memory for this engine: ", trt::logger().last()));
            settings_->setExecutionContextAllocationStrategy(OWNED);
            settings_->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE);
            // Lazily, a shape's first runs would go by other kernels than its later ones, to other bits.
            settings_->setDynamicShapesKernelSpecializationStrategy(
                nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
            runtime_cache_.reset(settings_->createRuntimeCache());
            const std::vector<unsigned char> content = trt::read_kernels(kernels_);
            if (!content.empty()) runtime_cache_->deserialize(content.data(), content.size());  // a driver's own alone
            settings_->setRuntimeCache(*runtime_cache_);
        }
        return std::unique_ptr<nvinfer1::IExecutionContext>(engine_->createExecutionContext(settings_.get()));
    }
#else
    static constexpr bool CAPTURES = true;

    std::unique_ptr<nvinfer1::IExecutionContext> create_context() {
        return std::unique_ptr<nvinfer1::IExecutionContext>(engine_->createExecutionContext(OWNED));
    }

    void keep_kernels() const {}
#endif

    // An input's smallest or largest shape; a static one is in no profile.
    Shape bound(const std::string& name, std::int32_t profile, nvinfer1::OptProfileSelector end) const {
        const Shape shape = trt::shape_of(engine_->getTensorShape(name.c_str()));
        if (!trt::contains_negative(shape)) return shape;
        return trt::shape_of(engine_->getProfileShape(name.c_str(), profile, end));
    }

    // Allocates each tensor for its largest shape in any profile; the executions that say so are kept.
    void allocate() {
        std::map<std::string, std::size_t> bytes;
        const auto add = [&](const std::string& name, const Shape& shape) {
            const std::size_t item = is_integer(name) ? sizeof(std::int64_t) : sizeof(float);
            bytes[name] = std::max(bytes[name], count(shape) * item);
        };
        for (std::int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile) {
            std::vector<Shape> most;
            for (const auto& name : inputs) most.push_back(bound(name, profile, nvinfer1::OptProfileSelector::kMAX));
            Execution made = execution(profile, most);
            for (std::size_t index = 0; index < most.size(); ++index) add(inputs[index], most[index]);
            for (const auto& [name, shape] : made.outputs) add(name, shape);
            executions_.emplace(most, std::move(made));
        }
        for (const auto& [name, size] : bytes) buffers_.try_emplace(name, size);
    }

    void bind(nvinfer1::IExecutionContext& context) {
        for (auto& [name, buffer] : buffers_)
            if (!context.setTensorAddress(name.c_str(), buffer.device))
                throw EngineError(text(DIT_TENSORRT, " does not bind ", name, ": ", trt::logger().last()));
    }

    bool is_integer(const std::string& name) const {
        const nvinfer1::DataType type = engine_->getTensorDataType(name.c_str());
        const bool output = contains(outputs, name);
        if (type != nvinfer1::DataType::kFLOAT && (output || type != nvinfer1::DataType::kINT64))
            throw BundleError(text(name, " is not float32", output ? "" : " or int64", " in this engine"));
        return type == nvinfer1::DataType::kINT64;
    }

    // In the order of needs.
    void close() {
        executions_.clear();
        buffers_.clear();
        activations_.reset();
#ifdef TRT_MAJOR_RTX
        settings_.reset();
        runtime_cache_.reset();
#endif
        engine_.reset();
        runtime_.reset();
    }

    Log* const log_;
    Path kernels_;  // empty: they are not kept
    // What is named first is destroyed last.
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
#ifdef TRT_MAJOR_RTX
    std::unique_ptr<nvinfer1::IRuntimeCache> runtime_cache_;
    std::unique_ptr<nvinfer1::IRuntimeConfig> settings_;
#endif
    std::unique_ptr<Buffer> activations_;
    std::map<std::string, Buffer> buffers_;  // by tensor
    std::map<std::vector<Shape>, Execution> executions_;
    std::uint64_t runs_ = 0;
    bool records_ = false;
};

}  // namespace

// The version of the loaded library, which may be newer than the headers.
std::string trt_version() {
    return text(getInferLibMajorVersion(), ".", getInferLibMinorVersion(), ".", getInferLibPatchVersion());
}

std::unique_ptr<Engine> open_trt(const std::vector<Path>& files, const Stage& stage, const Options& options) {
    trt::logger().clear();  // what another engine did is not why this one fails
    const Path& path = files.at(0);
    if (options.threads)
        throw UsageError(text("threads is an option of the CPU's backends; this stage runs on ", DIT_TENSORRT));
    const auto own = stage.built.find(DIT_TENSORRT);
    const Built built = own == stage.built.end() ? Built{} : own->second;
    const int device = gpu_number(options.device);
    const std::string reason = refusal(DIT_TENSORRT, built, trt::gpu(device));
    const std::string command = text("; on the target, make it with: dit-run compile ", path.parent_path().string(),
                                     " --backend ", DIT_TENSORRT);
    if (!reason.empty()) throw BundleError(text(path.string(), ": cannot run here: ", reason, command));
    if (files.size() > 1)  // its weights are in the ONNX form
        throw BundleError(text(path.string(), ": built with --strip-plan, which libdit does not refit", command));
    const cuda::Device here(device);
    try {
        return std::make_unique<TrtEngine>(files, built, options, command);
    } catch (const NpyError& error) {
        throw BundleError(text(path.string(), ": ", error.what()));
    }
}

}  // namespace dit_runtime
