#include "ov_graph.hpp"

#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dit_runtime {
namespace {

const std::map<std::string, ov::element::Type> HINTS = {{"fp32", ov::element::f32}, {"bf16", ov::element::bf16}};

// One for all engines of the process while any lives: each ov::Core loads its plugins anew.
std::shared_ptr<ov::Core> shared_core() {
    static std::mutex mutex;
    static std::weak_ptr<ov::Core> shared;
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<ov::Core> core = shared.lock();
    if (!core) shared = core = std::make_shared<ov::Core>();
    return core;
}

// Gives back the memory in which the folder's weights are mapped: what is compiled has packed them for itself. OpenVINO
// keeps the file mapped, though, and the pages that were read would stay.
void give_back(const Path& folder) {
#ifdef __linux__
    std::error_code failure;
    const std::string prefix = (std::filesystem::canonical(folder, failure) / "").string();
    std::ifstream maps("/proc/self/maps");
    for (std::string line; !failure && std::getline(maps, line);) {
        std::istringstream words(line);
        std::string rights, skipped, path;
        std::uintptr_t first = 0, last = 0;
        char dash = 0;
        words >> std::hex >> first >> dash >> last >> rights >> skipped >> skipped >> skipped >> std::ws;
        std::getline(words, path);
        if (rights == "r--s" && path.rfind(prefix, 0) == 0)  // shared and only read: what is read again is as it was
            madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
    }
#else
    static_cast<void>(folder);
#endif
}

}  // namespace

std::string ov_reason(std::string message) {
    message = strip(message);
    const std::size_t line = message.rfind('\n');
    return line == std::string::npos ? message : message.substr(line + 1);
}

OvDevice::OvDevice(const Options& options) : core(shared_core()) {
    if (!options.device.empty()) name = options.device;
    for (char& letter : name) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
    try {
        core->get_property(name, ov::device::full_name);  // asks this device's plugin and no other
    } catch (const std::exception& error) {
        throw NoDevice(text("device '", options.device, "' is not known to OpenVINO: ", ov_reason(error.what())));
    }
    capabilities_ = options.capabilities ? *options.capabilities : core->get_property(name, ov::device::capabilities);
}

std::string OvDevice::float_type(const std::string& precision) const {
    return precision != "fp32" && contains(capabilities_, "BF16") ? "bf16" : "fp32";
}

OvGraph::OvGraph(const Path& path, const Stage& stage, const Options& options)
    : device(options), type(device.float_type(stage.precision)), path_(path) {
    settings_ = {ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY)};
    // A CPU's threads are not tied to cores: models that are open side by side may get the same one.
    if (device.name == "CPU") settings_.insert(ov::hint::enable_cpu_pinning(false));
    if (options.threads) settings_.insert(ov::inference_num_threads(options.threads));
    for (const auto& [key, value] : own_settings("openvino", options)) settings_[key] = value;
}

std::shared_ptr<ov::Model> OvGraph::read() const {
    // OpenVINO tries every format that it knows on what is no ONNX; a model begins with one of its fields' tags.
    const int first = std::ifstream(path_, std::ios::binary).get();
    if (first < 0 ||
        std::string("\x08\x12\x1a\x22\x28\x32\x3a\x42\x72\xa2\xca").find(static_cast<char>(first)) == std::string::npos)
        throw BundleError(path_.string() + ": OpenVINO does not open it: it is no ONNX model");
    try {
        return device.core->read_model(path_.string());
    } catch (const std::bad_alloc&) {
        throw;
    } catch (const std::exception& error) {
        throw BundleError(text(path_.string(), ": OpenVINO does not open it: ", ov_reason(error.what())));
    }
}

std::vector<ov::InferRequest> OvGraph::compile(const std::shared_ptr<ov::Model>& model, const std::string& type,
                                               std::size_t streams) const {
    ov::AnyMap settings = settings_;
    settings.insert(ov::hint::inference_precision(HINTS.at(type)));
    if (streams > 1) settings.insert(ov::num_streams(static_cast<std::int32_t>(streams)));
    try {
        ov::CompiledModel compiled = device.core->compile_model(model, device.name, settings);
        std::vector<ov::InferRequest> requests(streams);
        for (ov::InferRequest& request : requests) request = compiled.create_infer_request();
        give_back(path_.parent_path());
        return requests;
    } catch (const std::bad_alloc&) {
        throw;
    } catch (const std::exception& error) {
        throw not_compiled(error);
    }
}

BundleError OvGraph::not_compiled(const std::exception& error) const {
    return BundleError(text(path_.string(), ": OpenVINO does not compile it: ", ov_reason(error.what())));
}

}  // namespace dit_runtime
