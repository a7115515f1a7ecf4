// ONNX Runtime through its C API: opens the ONNX form itself.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

#include "engine.hpp"
#include "errors.hpp"

namespace dit_runtime {
namespace {

struct Provider {
    const char* device;  // as the user says it
    const char* name;    // as ONNX Runtime says it
};

constexpr Provider PROVIDERS[] = {{"cpu", "CPUExecutionProvider"},
                                  {"cuda", "CUDAExecutionProvider"},
                                  {"tensorrt", "TensorrtExecutionProvider"},
                                  {"tensorrt-rtx", "NvTensorRTRTXExecutionProvider"},
                                  {"openvino", "OpenVINOExecutionProvider"}};

// True if u8 x s8 products overflow 16 bits here: on x86 without VNNI, and if the system does not say.
bool saturates() {
    std::ifstream file("/proc/cpuinfo");
    if (!file) return true;
    const std::string flags(std::istreambuf_iterator<char>(file), {});
    return flags.find("sse2") != std::string::npos && flags.find("vnni") == std::string::npos;
}

// The functions, or a refusal where the library is older than these headers.
const OrtApi& api() {
    static const OrtApi* const table = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (!table)
        throw UsageError(text("ONNX Runtime ", OrtGetApiBase()->GetVersionString(), " is older than 1.",
                              ORT_API_VERSION, ", whose headers this library was built with; install a newer one"));
    return *table;
}

struct OrtFailure : EngineError {
    using EngineError::EngineError;
};

void check(OrtStatus* status) {
    if (!status) return;
    const std::string message = first_line(api().GetErrorMessage(status));
    api().ReleaseStatus(status);
    throw OrtFailure(message);
}

template <typename T, void (*OrtApi::*release)(T*)>
struct Release {
    void operator()(T* pointer) const { (api().*release)(pointer); }
};

using Environment = std::unique_ptr<OrtEnv, Release<OrtEnv, &OrtApi::ReleaseEnv>>;
using Settings = std::unique_ptr<OrtSessionOptions, Release<OrtSessionOptions, &OrtApi::ReleaseSessionOptions>>;
using Session = std::unique_ptr<OrtSession, Release<OrtSession, &OrtApi::ReleaseSession>>;
using Memory = std::unique_ptr<OrtMemoryInfo, Release<OrtMemoryInfo, &OrtApi::ReleaseMemoryInfo>>;
using Value = std::unique_ptr<OrtValue, Release<OrtValue, &OrtApi::ReleaseValue>>;
using Info = std::unique_ptr<OrtTensorTypeAndShapeInfo,
                             Release<OrtTensorTypeAndShapeInfo, &OrtApi::ReleaseTensorTypeAndShapeInfo>>;

std::vector<std::string> available() {
    char** names = nullptr;
    int length = 0;
    check(api().GetAvailableProviders(&names, &length));
    const std::vector<std::string> providers(names, names + length);
    check(api().ReleaseAvailableProviders(names, length));
    return providers;
}

void append(OrtSessionOptions* settings, const std::string& device) {
    if (device == "cuda") {
        OrtCUDAProviderOptionsV2* options = nullptr;
        check(api().CreateCUDAProviderOptions(&options));
        OrtStatus* status = api().SessionOptionsAppendExecutionProvider_CUDA_V2(settings, options);
        api().ReleaseCUDAProviderOptions(options);
        check(status);
    } else if (device == "tensorrt") {
        OrtTensorRTProviderOptionsV2* options = nullptr;
        check(api().CreateTensorRTProviderOptions(&options));
        OrtStatus* status = api().SessionOptionsAppendExecutionProvider_TensorRT_V2(settings, options);
        api().ReleaseTensorRTProviderOptions(options);
        check(status);
    } else if (device == "tensorrt-rtx") {
        check(api().SessionOptionsAppendExecutionProvider(settings, "NvTensorRtRtx", nullptr, nullptr, 0));
    } else if (device == "openvino") {
        check(api().SessionOptionsAppendExecutionProvider_OpenVINO_V2(settings, nullptr, nullptr, 0));
    }
}

class OrtEngine : public Engine {
  public:
    OrtEngine(const Path& path, const Options& options) {
        const std::string device = options.device.empty() ? "cpu" : lower(options.device);
        std::vector<std::string> here;
        bool known = false;
        for (const Provider& provider : PROVIDERS) {
            const std::vector<std::string> providers = available();
            if (!contains(providers, provider.name)) continue;
            here.push_back(provider.device);
            known = known || device == provider.device;
        }
        if (!known)
            throw UsageError(text("device '", options.device, "' is not in this ONNX Runtime; here: ", join(here)));
        OrtEnv* environment = nullptr;
        check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "dit", &environment));
        environment_.reset(environment);
        OrtSessionOptions* made = nullptr;
        check(api().CreateSessionOptions(&made));
        const Settings settings(made);
        if (saturates())  // then as u8 x u8, exact, and at 0.4 of the speed also where it would not be needed
            check(api().AddSessionConfigEntry(made, "session.x64quantprecision", "1"));
        if (options.threads) check(api().SetIntraOpNumThreads(made, options.threads));
        if (options.low_memory) {
            check(api().DisableCpuMemArena(made));
            check(api().DisableMemPattern(made));
        }
        try {
            append(made, device);
        } catch (const OrtFailure& failure) {
            throw UsageError(text("device '", device, "' did not start here: ", failure.what()));
        }
        OrtSession* session = nullptr;
        try {
            check(api().CreateSession(environment, path.c_str(), made, &session));
        } catch (const OrtFailure& failure) {
            throw BundleError(text(path.string(), ": ONNX Runtime does not open it: ", failure.what()));
        }
        session_.reset(session);
        OrtMemoryInfo* memory = nullptr;
        check(api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
        memory_.reset(memory);
        inputs = names(&OrtApi::SessionGetInputCount, &OrtApi::SessionGetInputName);
        outputs = names(&OrtApi::SessionGetOutputCount, &OrtApi::SessionGetOutputName);
    }

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        std::vector<Value> values;
        std::vector<const char*> in, out;
        std::vector<const OrtValue*> raw;
        for (const Input& input : arrays) {
            const auto type =
                input.integers ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
            const std::size_t bytes = count(input.shape) * (input.integers ? sizeof(std::int64_t) : sizeof(float));
            OrtValue* value = nullptr;
            // Inputs are only read; the C API has no const for them.
            check(api().CreateTensorWithDataAsOrtValue(memory_.get(), const_cast<void*>(input.data), bytes,
                                                       input.shape.data(), input.shape.size(), type, &value));
            values.emplace_back(value);
            raw.push_back(value);
            in.push_back(input.name.c_str());
        }
        for (const auto& name : outputs) out.push_back(name.c_str());
        std::vector<OrtValue*> results(outputs.size(), nullptr);
        OrtStatus* status = api().Run(session_.get(), nullptr, in.data(), raw.data(), in.size(), out.data(), out.size(),
                                      results.data());
        std::vector<Value> owned;
        for (OrtValue* result : results) owned.emplace_back(result);
        check(status);
        std::map<std::string, Output> named;
        for (std::size_t index = 0; index < outputs.size(); ++index)
            named[outputs[index]] = read(outputs[index], results[index]);
        return named;
    }

  private:
    std::vector<std::string> names(decltype(OrtApi::SessionGetInputCount) OrtApi::* size,
                                   decltype(OrtApi::SessionGetInputName) OrtApi::* get) {
        std::size_t length = 0;
        check((api().*size)(session_.get(), &length));
        OrtAllocator* allocator = nullptr;
        check(api().GetAllocatorWithDefaultOptions(&allocator));
        std::vector<std::string> names;
        for (std::size_t index = 0; index < length; ++index) {
            char* name = nullptr;
            check((api().*get)(session_.get(), index, allocator, &name));
            names.emplace_back(name);
            check(api().AllocatorFree(allocator, name));
        }
        return names;
    }

    static Output read(const std::string& name, OrtValue* value) {
        OrtTensorTypeAndShapeInfo* made = nullptr;
        check(api().GetTensorTypeAndShape(value, &made));
        const Info info(made);
        ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        check(api().GetTensorElementType(made, &type));
        if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
            throw EngineError(text("output ", name, " has ONNX's element type ", type, ", expected float32"));
        std::size_t rank = 0;
        check(api().GetDimensionsCount(made, &rank));
        Output output{Shape(rank), {}};
        check(api().GetDimensions(made, output.shape.data(), rank));
        void* data = nullptr;
        check(api().GetTensorMutableData(value, &data));
        const float* numbers = static_cast<const float*>(data);
        output.values.assign(numbers, numbers + count(output.shape));
        return output;
    }

    Environment environment_;  // outlives the session
    Session session_;
    Memory memory_;
};

}  // namespace

std::string ort_version() { return OrtGetApiBase()->GetVersionString(); }

std::unique_ptr<Engine> open_ort(const std::vector<Path>& files, const Stage&, const Options& options) {
    return std::make_unique<OrtEngine>(files.at(0), options);
}

}  // namespace dit_runtime
