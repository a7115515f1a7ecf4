#include "engine.hpp"

#include <numeric>
#include <sstream>

#include "errors.hpp"
#include "facts.hpp"

namespace dit_runtime {

namespace {

// Why ONNX Runtime cannot run a graph of this precision on a device; empty where it can. Mirrors refusal() in ort.py.
std::string without_kernels(const std::string& backend, const std::string& precision, const std::string& device) {
    if (backend != "onnxruntime") return "";
    const std::string on = device.empty() ? "cpu" : lower(device);
    if (on == "cpu" && precision == "bf16")
        return "bf16 has no kernels in ONNX Runtime's CPU provider; use device cuda";
    if (on.rfind("cuda", 0) == 0 && precision == "int8")
        return "int8 has no kernels in ONNX Runtime's CUDA provider; build fp16, or use device cpu";
    return "";
}

}  // namespace

const Backend& choose(const Stage& stage, const Options& options) {
    // `auto` is the bundle's own, or else the first here that can.
    const std::string& name = options.backend.empty() || options.backend == "auto" ? stage.backend : options.backend;
    std::vector<std::string> known;
    for (const Backend& backend : backends()) {
        if (backend.name == name) {
            if (!contains(backend.precisions, stage.precision))
                throw UsageError(
                    text("backend '", name, "' has no ", stage.precision, "; it has ", join(backend.precisions)));
            const std::string reason = without_kernels(name, stage.precision, options.device);
            if (!reason.empty()) throw UsageError(reason);
            if (!backend.opens_onnx && !stage.engines.count(name))
                throw UsageError("this bundle has no engines of " + name + ": run `dit-run compile --backend " + name +
                                 "` on it");
            return backend;
        }
        known.push_back(backend.name);
    }
    if (options.backend == "auto")
        for (const Backend& backend : backends())
            if (backend.opens_onnx && contains(backend.precisions, stage.precision) &&
                without_kernels(backend.name, stage.precision, options.device).empty())
                return backend;
    const std::string missing = missing_backends();
    throw NoBackend(text("backend '", name, "' is not in this library", nearest(name, known),
                         "; it has: ", known.empty() ? "none" : join(known), missing.empty() ? "" : "; " + missing));
}

namespace {

// "8.9" -> {8, 9}
std::vector<int> numbers(const std::string& version, std::size_t most = SIZE_MAX) {
    std::vector<int> integers;
    std::istringstream parts(version);
    for (std::string part; integers.size() < most && std::getline(parts, part, '.');)
        if (!part.empty() && part.size() < 9 && part.find_first_not_of("0123456789") == std::string::npos)
            integers.push_back(std::stoi(part));
    return integers;
}

// Plans are for one version; a version-compatible one also for later ones of the same major version.
bool opens(const std::string& here, const Built& built) {
    const std::vector<int> mine = numbers(here, 3), its = numbers(built.version, 3);  // packages add a fourth
    return !its.empty() && (mine == its || (built.version_compatible && mine.at(0) == its[0] && mine >= its));
}

}  // namespace

int gpu_number(const std::string& device) {
    const std::string name = lower(device);
    if (name.empty() || name == "cuda") return 0;
    if (on_cuda(device))
        for (const int number : numbers(name.substr(5), 1))
            if (name == text("cuda:", number)) return number;
    throw UsageError(text("device '", device, "' is no NVIDIA GPU; expected cuda, cuda:0, cuda:1, …"));
}

bool on_cuda(const std::string& device) {
    const std::string name = lower(device);
    return name == "cuda" || name.rfind("cuda:", 0) == 0;
}

std::vector<std::string> files_for(const Stage& stage, const Backend& backend, const std::string& device) {
    // The CUDA provider has kernels for what the CPU's form takes apart: it opens a form of its own, or the portable
    // one.
    const bool cuda = backend.name == "onnxruntime" && on_cuda(device);
    return stage.files(cuda ? "onnxruntime-cuda" : backend.name);
}

std::string refusal(const std::string& backend, const Built& built, const Gpu& here) {
    if (!opens(here.version, built))
        return text("built by ", backend, " ", built.version.empty() ? "of no known version" : built.version,
                    ", and here is ", here.version);
    if (!here.driver) return "no NVIDIA driver";
    if (here.driver / 1000 < built.cuda)
        return text("the NVIDIA driver has CUDA ", here.driver / 1000, ", expected ", built.cuda, " or later");
    if (here.capability.empty()) return "no NVIDIA GPU";
    for (const std::string& known : built.compute_capabilities) {
        const bool later = !known.empty() && known.back() == '+';
        if (known == here.capability ||
            (later && numbers(here.capability) >= numbers(known.substr(0, known.size() - 1))))
            return "";
    }
    if (built.compute_capabilities.empty()) return "";
    return text("compute capability ", here.capability, " here, and the engine is for ",
                join(built.compute_capabilities));
}

std::string first_line(const std::string& message) { return message.substr(0, message.find('\n')); }

}  // namespace dit_runtime
