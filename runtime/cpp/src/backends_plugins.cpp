// The backends whose plugins lie beside libdit and open here: libdit runs without those whose engine library is
// missing.
#include <dlfcn.h>

#include "engine.hpp"
#include "errors.hpp"
#include "facts.hpp"
#include "plugin.hpp"

namespace dit_runtime {
namespace {

struct Plugins {
    std::vector<Backend> backends;
    std::vector<std::string> missing;  // why a plugin that is there does not open
};

// The folder of this library; "" where the system does not say it.
Path folder() {
    Dl_info info = {};
    if (!dladdr(reinterpret_cast<const void*>(&backends), &info) || !info.dli_fname) return {};
    std::error_code failure;
    return std::filesystem::canonical(info.dli_fname, failure).parent_path();
}

// Adds a backend's plugin. It stays open until the process ends, for engines leave threads of their own behind.
void add(const std::string& name, Plugins& plugins) {
    const Path path = folder() / ("libdit-" + name + ".so");
    std::error_code failure;
    if (!std::filesystem::exists(path, failure)) return;
    const auto refuse = [&](const std::string& reason) {
        plugins.missing.push_back(path.filename().string() + ": " + reason);
    };
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!library) {
        const char* const reason = dlerror();
        return refuse(reason ? reason : "it does not open");
    }
    const auto get = reinterpret_cast<decltype(&dit_plugin)>(dlsym(library, "dit_plugin"));
    const Plugin* const plugin = get ? get() : nullptr;
    if (!plugin || std::string(plugin->build) != PLUGIN_BUILD) return refuse("it is of another version of libdit");
    plugins.backends.insert(plugins.backends.end(), plugin->backends->begin(), plugin->backends->end());
}

const Plugins& plugins() {
    static const Plugins all = [] {
        Plugins plugins;
        // In an order that has the backend first which takes the place of those that are missing.
        for (const char* name : {"onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"}) add(name, plugins);
        return plugins;
    }();
    return all;
}

}  // namespace

const std::vector<Backend>& backends() { return plugins().backends; }

std::string missing_backends() { return join(plugins().missing, "; "); }

}  // namespace dit_runtime
