// ONNX Runtime through its C API: opens the ONNX form itself.
#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>

#include "ort.hpp"

namespace dit_runtime {
namespace ort {
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

std::vector<std::string> available() {
    char** names = nullptr;
    int length = 0;
    check(api().GetAvailableProviders(&names, &length));
    const std::vector<std::string> providers(names, names + length);
    check(api().ReleaseAvailableProviders(names, length));
    return providers;
}

void append(OrtSessionOptions* settings, const std::string& device, const ProviderOptions& provider_options) {
    std::vector<const char*> keys, values;
    for (const auto& [key, value] : provider_options) keys.push_back(key.c_str()), values.push_back(value.c_str());
    if (device == "cuda") {
        OrtCUDAProviderOptionsV2* options = nullptr;
        check(api().CreateCUDAProviderOptions(&options));
        OrtStatus* status = api().UpdateCUDAProviderOptions(options, keys.data(), values.data(), keys.size());
        if (!status) status = api().SessionOptionsAppendExecutionProvider_CUDA_V2(settings, options);
        api().ReleaseCUDAProviderOptions(options);
        check(status);
    } else if (device == "tensorrt") {
        OrtTensorRTProviderOptionsV2* options = nullptr;
        check(api().CreateTensorRTProviderOptions(&options));
        OrtStatus* status = api().UpdateTensorRTProviderOptions(options, keys.data(), values.data(), keys.size());
        if (!status) status = api().SessionOptionsAppendExecutionProvider_TensorRT_V2(settings, options);
        api().ReleaseTensorRTProviderOptions(options);
        check(status);
    } else if (device == "tensorrt-rtx") {
        check(api().SessionOptionsAppendExecutionProvider(settings, "NvTensorRtRtx", keys.data(), values.data(),
                                                          keys.size()));
    } else if (device == "openvino") {
        check(
            api().SessionOptionsAppendExecutionProvider_OpenVINO_V2(settings, keys.data(), values.data(), keys.size()));
    } else if (!keys.empty()) {
        throw UsageError(text("setting onnxruntime.provider.", keys[0], ": the CPU's provider takes none"));
    }
}

// What a setting's key begins with if it is the provider's, else it is the session's.
const std::string PROVIDER = "provider.";

// The threads of a session, and where they run. The thread that calls is the first of them, wherever it runs.
void set_threads(OrtSessionOptions* settings, const Options& options) {
    const std::vector<std::size_t>& cpus = options.affinity;
    const int threads = options.threads ? options.threads : static_cast<int>(cpus.size());
    if (threads) check(api().SetIntraOpNumThreads(settings, threads));
    if (cpus.empty()) return;
    if (static_cast<std::size_t>(threads) > cpus.size())
        throw UsageError(
            text("affinity has ", cpus.size(), " CPUs for ", threads, " threads; expected one each, or more"));
    std::vector<std::string> places;  // ONNX Runtime counts from 1
    for (int thread = 1; thread < threads; ++thread)
        places.push_back(std::to_string(cpus[static_cast<std::size_t>(thread)] + 1));
    if (!places.empty())
        check(api().AddSessionConfigEntry(settings, "session.intra_op_thread_affinities", join(places, ";").c_str()));
}

// The provider's name for the user, without a GPU's number.
std::string device_of(const Options& options) {
    return on_cuda(options.device) ? "cuda" : options.device.empty() ? "cpu" : lower(options.device);
}

// The environment of all sessions, until the process ends: ONNX Runtime frees its last one outside its lock, and one
// that is made meanwhile is refused.
OrtEnv* environment() {
    static OrtEnv* const only = [] {
        OrtEnv* made = nullptr;
        check(api().CreateEnv(ORT_LOGGING_LEVEL_FATAL, "dit", &made));
        return made;
    }();
    return only;
}

// Refuses a device that this ONNX Runtime does not have, before any is touched.
void require_provider(const Options& options) {
    std::vector<std::string> here;
    const std::vector<std::string> providers = available();
    for (const Provider& provider : PROVIDERS)
        if (contains(providers, provider.name)) here.push_back(provider.device);
    if (!contains(here, device_of(options)))
        throw NoDevice(text("device '", options.device, "' is not in this ONNX Runtime; here: ", join(here)));
}

// Settings that leave weights as they are stored.
constexpr const char* STREAMED[][2] = {
    {"session.disable_prepacking", "1"},
    {"optimization.constant_folding_max_output_size_in_bytes", "1048576"},
    {"optimization.disable_specified_optimizers", "FuseFp16InitializerToFp32NodeTransformer"}};

Output read(const std::string& name, OrtValue* value) {
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

}  // namespace

const OrtApi& api() {
    static const OrtApi* const table = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (!table)
        throw NoBackend(text("ONNX Runtime ", OrtGetApiBase()->GetVersionString(), " is older than 1.", ORT_API_VERSION,
                             ", whose headers this library was built with; install a newer one"));
    return *table;
}

void check(OrtStatus* status) {
    if (!status) return;
    const std::string message = first_line(api().GetErrorMessage(status));
    api().ReleaseStatus(status);
    throw OrtFailure(message);
}

ProviderOptions cuda_options(int device) {
    return {{"device_id", std::to_string(device)},
            {"use_tf32", "0"},  // TF32 has ten bits
            {"cudnn_conv_algo_search", "HEURISTIC"},
            {"cudnn_conv_use_max_workspace", "1"}};
}

OrtEngine::OrtEngine(const Path& path, const Options& options, const ProviderOptions& more) {
    const bool cuda = on_cuda(options.device);
    OrtSessionOptions* made = nullptr;
    check(api().CreateSessionOptions(&made));
    const Settings settings(made);
    if (saturates())  // then as u8 x u8, exact, and at 0.4 of the speed also where it would not be needed
        check(api().AddSessionConfigEntry(made, "session.x64quantprecision", "1"));
    if (cuda) check(api().AddSessionConfigEntry(made, "session.record_ep_graph_assignment_info", "1"));
    set_threads(made, options);
    ProviderOptions provider_options = more;
    for (const auto& [key, value] : own_settings("onnxruntime", options))
        if (key.rfind(PROVIDER, 0) == 0)
            provider_options[key.substr(PROVIDER.size())] = value;
        else
            check(api().AddSessionConfigEntry(made, key.c_str(), value.c_str()));
    if (options.low_memory || options.streamed) {
        check(api().DisableCpuMemArena(made));
        check(api().DisableMemPattern(made));
    }
    if (options.streamed)  // so that weights stay in the file, and what is made of one goes before the next comes
        for (const auto& [name, value] : STREAMED) check(api().AddSessionConfigEntry(made, name, value));
    try {
        if (cuda) provider_options.merge(cuda_options(gpu_number(options.device)));
        append(made, device_of(options), provider_options);
    } catch (const OrtFailure& failure) {
        throw NoDevice(text("device '", options.device, "' did not start here: ", failure.what()));
    }
    OrtSession* session = nullptr;
    try {
        check(api().CreateSession(environment(), path.c_str(), made, &session));
    } catch (const OrtFailure& failure) {
        throw BundleError(text(path.string(), ": ONNX Runtime does not open it: ", failure.what()));
    }
    session_.reset(session);
    if (cuda) require_placement(path, placements(session));
    OrtMemoryInfo* memory = nullptr;
    check(api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    memory_.reset(memory);
    OrtRunOptions* running = nullptr;
    check(api().CreateRunOptions(&running));
    running_.reset(running);
    inputs = names(&OrtApi::SessionGetInputCount, &OrtApi::SessionGetInputName);
    outputs = names(&OrtApi::SessionGetOutputCount, &OrtApi::SessionGetOutputName);
}

std::map<std::string, Output> OrtEngine::run(const std::vector<Input>& arrays) {
    std::vector<Value> values;
    std::vector<const char*> in, out;
    std::vector<const OrtValue*> raw;
    for (const Input& input : arrays) {
        // Inputs are only read; the C API has no const for them.
        values.push_back(value(input, const_cast<void*>(input.data), memory_.get()));
        raw.push_back(values.back().get());
        in.push_back(input.name.c_str());
    }
    for (const auto& name : outputs) out.push_back(name.c_str());
    std::vector<OrtValue*> results(outputs.size(), nullptr);
    OrtStatus* status = api().Run(session_.get(), running_.get(), in.data(), raw.data(), in.size(), out.data(),
                                  out.size(), results.data());
    std::vector<Value> owned;
    for (OrtValue* result : results) owned.emplace_back(result);
    check(status);
    std::map<std::string, Output> named;
    for (std::size_t index = 0; index < outputs.size(); ++index)
        named[outputs[index]] = read(outputs[index], results[index]);
    return named;
}

// ONNX Runtime looks between two nodes whether it has to end. These calls cannot fail on options that are there.
void OrtEngine::stop() noexcept {
    if (OrtStatus* const status = api().RunOptionsSetTerminate(running_.get())) api().ReleaseStatus(status);
}

void OrtEngine::resume() noexcept {
    if (OrtStatus* const status = api().RunOptionsUnsetTerminate(running_.get())) api().ReleaseStatus(status);
}

// The input's array, at `data` in this memory.
Value OrtEngine::value(const Input& input, void* data, const OrtMemoryInfo* memory) {
    const auto type = input.integers ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    OrtValue* value = nullptr;
    check(api().CreateTensorWithDataAsOrtValue(memory, data, input.bytes(), input.shape.data(), input.shape.size(),
                                               type, &value));
    return Value(value);
}

std::vector<std::string> OrtEngine::names(decltype(OrtApi::SessionGetInputCount) OrtApi::* size,
                                          decltype(OrtApi::SessionGetInputName) OrtApi::* get) const {
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

}  // namespace ort

std::string ort_version() { return OrtGetApiBase()->GetVersionString(); }

std::unique_ptr<Engine> open_ort(const std::vector<Path>& files, [[maybe_unused]] const Stage& stage,
                                 const Options& options) {
    ort::require_provider(options);
#ifdef DIT_CUDA
    if (on_cuda(options.device)) return ort::open_cuda(files.at(0), stage, options);
#endif
    return std::make_unique<ort::OrtEngine>(files.at(0), options);
}

}  // namespace dit_runtime
