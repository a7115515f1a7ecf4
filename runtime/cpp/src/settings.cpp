// Settings of stages' engines, by key and value.
#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "engine.hpp"
#include "errors.hpp"
#include "facts.hpp"

namespace dit_runtime {
namespace {

const std::vector<std::string> KEYS = {"backend", "device", "threads", "affinity", "cache"};

// "3" -> 3; nothing where it is no number from 0 to 99999.
std::optional<std::size_t> integer(const std::string& word) {
    if (word.empty() || word.size() > 5 || word.find_first_not_of("0123456789") != std::string::npos) return {};
    return std::stoul(word);
}

// "0-2,5" -> {0, 1, 2, 5}
std::vector<std::size_t> cpus(const std::string& list) {
    std::vector<std::size_t> numbers;
    for (std::size_t first = 0; first <= list.size();) {
        const std::size_t last = std::min(list.find(',', first), list.size());
        const std::string part = list.substr(first, last - first);
        const std::size_t dash = part.find('-');
        const auto from = integer(part.substr(0, dash));
        const auto to = dash == std::string::npos ? from : integer(part.substr(dash + 1));
        if (!from || !to || *to < *from)
            throw UsageError(text("setting affinity is '", list, "'; expected CPUs, such as 0-3,8"));
        for (std::size_t cpu = *from; cpu <= *to; ++cpu) numbers.push_back(cpu);
        first = last + 1;
    }
    return numbers;
}

// Backends that take settings of their own, as BACKEND.KEY.
const std::vector<std::string> OWNERS = {"onnxruntime", "openvino"};

bool is_own(const std::string& key) {
    const std::string name = key.substr(0, key.find('.'));
    if (name == key || !facts().at("precisions").contains(name)) return false;
    if (!contains(OWNERS, name))
        throw UsageError(text("setting '", key, "': ", name, " has no settings of its own, for its engines were built ",
                              "with theirs; leave it out"));
    return true;
}

void apply(const EngineSetting& setting, Options& options) {
    const auto& [stage, key, value] = setting;
    if (key == "backend") {
        options.backend = value;
    } else if (key == "device") {
        options.device = value;
    } else if (key == "cache") {
        options.cache = value;
    } else if (key == "affinity") {
        options.affinity = cpus(value);
    } else if (key == "threads") {
        const auto threads = integer(value);
        if (!threads || !*threads) throw UsageError(text("setting threads is '", value, "'; expected 1 or more"));
        options.threads = static_cast<int>(*threads);
    } else if (is_own(key)) {
        options.own[key] = value;
    } else {
        throw UsageError(text("setting '", key, "' is not known", nearest(key, KEYS), "; known: ", join(KEYS), ", and ",
                              join(OWNERS, ".KEY, "), ".KEY"));
    }
}

}  // namespace

void check_settings(const Options& options, const Manifest& manifest) {
    std::vector<std::string> names;
    for (const Stage& stage : manifest.stages) names.push_back(stage.name);
    if (manifest.update) names.push_back(manifest.update->name);
    for (const EngineSetting& setting : options.settings) {
        if (!setting.stage.empty() && !contains(names, setting.stage))
            throw UsageError(text("setting ", setting.key, ": this bundle has no stage '", setting.stage, "'",
                                  nearest(setting.stage, names), "; it has ", join(names)));
        Options unused;
        apply(setting, unused);
    }
}

Options options_of(const Stage& stage, const Options& options) {
    Options own = options;
    for (const EngineSetting& setting : options.settings)
        if (setting.stage.empty() || setting.stage == stage.name) apply(setting, own);
    return own;
}

std::map<std::string, std::string> own_settings(const std::string& backend, const Options& options) {
    std::map<std::string, std::string> settings;
    const std::string prefix = backend + ".";
    for (const auto& [key, value] : options.own)
        if (key.rfind(prefix, 0) == 0) settings[key.substr(prefix.size())] = value;
    return settings;
}

void throw_if_grave(const std::string& message) {
    const std::string words = lower(message);
    const auto says = [&](std::initializer_list<const char*> parts) {
        return std::any_of(parts.begin(), parts.end(),
                           [&](const char* part) { return words.find(part) != std::string::npos; });
    };
    if (says({"failed to allocate memory", "out of memory", "bad_alloc", "could not allocate", "memoryallocation",
              "available memory of", "cannot allocate memory", "can't alloc", "resource temporarily unavailable"}))
        throw EngineMemory(message + "; try fewer pictures at a time, or low_memory");
    if (says({"device lost", "device removed", "cudaerrorillegaladdress", "cudaerrorlaunchfailure", "cudaerrorecc",
              "unspecified launch failure", "illegal memory access", "cudaerrordevicesunavailable"}))
        throw DeviceLost(message);
}

}  // namespace dit_runtime
