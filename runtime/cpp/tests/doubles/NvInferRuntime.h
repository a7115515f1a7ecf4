// A TensorRT that is not here, with one engine: x [rows, 3] and table [groups, rows, 2], float32, become
// y = 2 x + the last group's first column of the table. Profile 0 has one group, profile 1 has two; up to four rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#ifdef DOUBLE_OF_RTX
#define TRT_MAJOR_RTX 1
#endif

namespace nvinfer1 {

enum class DataType : std::int32_t { kFLOAT = 0, kINT64 = 8 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class ProfilingVerbosity : std::int32_t { kLAYER_NAMES_ONLY = 0, kNONE = 1, kDETAILED = 2 };
enum class ExecutionContextAllocationStrategy : std::int32_t { kSTATIC = 0, kON_PROFILE_CHANGE = 1, kUSER_MANAGED = 2 };
enum class CudaGraphStrategy : std::int32_t { kDISABLED = 0, kWHOLE_GRAPH_CAPTURE = 1 };
enum class DynamicShapesKernelSpecializationStrategy : std::int32_t { kLAZY = 0, kEAGER = 1, kNONE = 2 };

struct Dims {
    std::int32_t nbDims;
    std::int64_t d[8];
};

// What the tests ask for, and what was done.
struct Double {
    bool opens = true;
    std::string refuses;                          // the call of a context that says no, once
    std::vector<ProfilingVerbosity> verbosities;  // of contexts, at each run
    std::vector<std::string> kernels;             // runtime caches that were read
    int contexts = 0, eager = 0, whole_graphs = 0, host_code = 0;

    bool fine(const char* call) { return call != refuses || (refuses.clear(), false); }
    static Double& here() {
        static Double tensorrt;
        return tensorrt;
    }
};

class ILogger {
  public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2 };
    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IHostMemory {
  public:
    const void* data() const { return content.data(); }
    std::size_t size() const { return content.size(); }
    std::string content;
};

class IRuntimeCache {
  public:
    bool deserialize(const void* data, std::size_t size) {
        return Double::here().kernels.emplace_back(static_cast<const char*>(data), size), true;
    }
    IHostMemory* serialize() const { return new IHostMemory{"compiled"}; }
};

class IRuntimeConfig {
  public:
    void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) { managed = strategy; }
    bool setCudaGraphStrategy(CudaGraphStrategy strategy) {
        return Double::here().whole_graphs += strategy == CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE, true;
    }
    void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy strategy) {
        Double::here().eager += strategy == DynamicShapesKernelSpecializationStrategy::kEAGER;
    }
    IRuntimeCache* createRuntimeCache() const { return new IRuntimeCache; }
    bool setRuntimeCache(const IRuntimeCache&) { return true; }

    ExecutionContextAllocationStrategy managed = ExecutionContextAllocationStrategy::kSTATIC;
};

class IExecutionContext {
  public:
    explicit IExecutionContext(ILogger& logger) : logger_(logger) { ++Double::here().contexts; }
    ~IExecutionContext() { --Double::here().contexts; }

    bool setNvtxVerbosity(ProfilingVerbosity verbosity) { return verbosity_ = verbosity, true; }
    bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t) { return groups_ = profile + 1, true; }
    void setDeviceMemoryV2(void* memory, std::int64_t) { memory_ = memory; }
    bool setInputShape(const char* name, const Dims& shape) {
        if (name == std::string("x")) rows_ = shape.d[0];
        return refused("setInputShape");
    }
    Dims getTensorShape(const char*) const {
        return Double::here().fine("getTensorShape") ? Dims{2, {rows_, 3}} : Dims{-1, {}};
    }
    bool setTensorAddress(const char* name, void* address) {
        (*name == 'x' ? x_ : *name == 'y' ? y_ : table_) = static_cast<float*>(address);
        return refused("setTensorAddress");
    }
    bool enqueueV3(cudaStream_t stream) {
        if (!refused("enqueueV3") || !memory_ || !x_ || !y_ || !table_) return false;
        Double::here().verbosities.push_back(verbosity_);
        later(stream, [x = x_, y = y_, table = table_, rows = rows_, groups = groups_] {
            for (std::int64_t i = 0; i < 3 * rows; ++i) y[i] = 2 * x[i] + table[2 * ((groups - 1) * rows + i / 3)];
        });
        return true;
    }

  private:
    bool refused(const char* call) {
        if (Double::here().fine(call)) return true;
        return logger_.log(ILogger::Severity::kERROR, "no room\nat all"), false;
    }

    ILogger& logger_;
    ProfilingVerbosity verbosity_ = ProfilingVerbosity::kDETAILED;
    void* memory_ = nullptr;
    float *x_ = nullptr, *y_ = nullptr, *table_ = nullptr;
    std::int64_t rows_ = 0, groups_ = 1;
};

class ICudaEngine {
  public:
    explicit ICudaEngine(ILogger& logger) : logger_(logger) {}

    std::int32_t getNbOptimizationProfiles() const { return 2; }
    std::int32_t getNbIOTensors() const { return 3; }
    const char* getIOTensorName(std::int32_t index) const { return index == 0 ? "x" : index == 1 ? "table" : "y"; }
    TensorIOMode getTensorIOMode(const char* name) const {
        return *name == 'y' ? TensorIOMode::kOUTPUT : TensorIOMode::kINPUT;
    }
    DataType getTensorDataType(const char*) const { return DataType::kFLOAT; }
    Dims getTensorShape(const char* name) const { return *name == 't' ? Dims{3, {-1, -1, 2}} : Dims{2, {-1, 3}}; }
    Dims getProfileShape(const char* name, std::int32_t profile, OptProfileSelector end) const {
        const std::int64_t rows = end == OptProfileSelector::kMIN ? 1 : 4;
        return *name == 't' ? Dims{3, {profile + 1, rows, 2}} : Dims{2, {rows, 3}};
    }
    std::int64_t getDeviceMemorySizeV2() const { return 256; }
    std::int64_t getStreamableWeightsSize() const { return 1 << 20; }
    std::int64_t getWeightStreamingAutomaticBudget() const { return 1 << 10; }
    bool setWeightStreamingBudgetV2(std::int64_t) { return true; }

    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) {
        const bool managed = strategy == ExecutionContextAllocationStrategy::kUSER_MANAGED;
        return managed ? new IExecutionContext(logger_) : nullptr;
    }
#ifdef DOUBLE_OF_RTX
    IRuntimeConfig* createRuntimeConfig() { return new IRuntimeConfig; }
    IExecutionContext* createExecutionContext(IRuntimeConfig* config) {
        return createExecutionContext(config->managed);
    }
#endif

  private:
    ILogger& logger_;
};

class IRuntime {
  public:
    explicit IRuntime(ILogger& logger) : logger_(logger) {}
    void setEngineHostCodeAllowed(bool allowed) { Double::here().host_code += allowed; }
    ICudaEngine* deserializeCudaEngine(const void*, std::size_t) {
        if (Double::here().opens) return new ICudaEngine(logger_);
        return logger_.log(ILogger::Severity::kERROR, "it is of another world"), nullptr;
    }

  private:
    ILogger& logger_;
};

inline IRuntime* createInferRuntime(ILogger& logger) { return new IRuntime(logger); }

}  // namespace nvinfer1

#ifdef DOUBLE_OF_RTX
inline std::int32_t getInferLibMajorVersion() { return 1; }
inline std::int32_t getInferLibMinorVersion() { return 7; }
inline std::int32_t getInferLibPatchVersion() { return 1; }
#else
inline std::int32_t getInferLibMajorVersion() { return 11; }
inline std::int32_t getInferLibMinorVersion() { return 4; }
inline std::int32_t getInferLibPatchVersion() { return 0; }
#endif
