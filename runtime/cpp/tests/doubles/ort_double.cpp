#include "ort_double.hpp"

#include <dlfcn.h>

#include <cstring>

Provider provider;

const OrtApi& real() {
    static const auto base =
        reinterpret_cast<const OrtApiBase* (*)()>(dlsym(dlopen(ONNXRUNTIME, RTLD_NOW), "OrtGetApiBase"))();
    return *base->GetApi(ORT_API_VERSION);
}

namespace {

OrtStatus* failure(const char* message) { return real().CreateStatus(ORT_FAIL, message); }

const OrtApi* ORT_API_CALL doubled(std::uint32_t version) NO_EXCEPTION {
    constexpr std::size_t ENTRIES = 414, PLACE = 407;  // of version 24, and of the first that says where nodes run
    static const void* table[ENTRIES];
    std::memcpy(table, &real(), sizeof(table));
    auto& api = reinterpret_cast<OrtApi&>(table);
    api.GetAvailableProviders = [](char*** names, int* length) noexcept -> OrtStatus* {
        static char cuda[] = "CUDAExecutionProvider", cpu[] = "CPUExecutionProvider";
        static char* all[] = {cuda, cpu};
        return *names = all, *length = 2, nullptr;
    };
    api.ReleaseAvailableProviders = [](char**, int) noexcept -> OrtStatus* { return nullptr; };
    api.CreateCUDAProviderOptions = [](OrtCUDAProviderOptionsV2** made) noexcept -> OrtStatus* {
        provider.options.emplace_back();
        return *made = reinterpret_cast<OrtCUDAProviderOptionsV2*>(&provider), nullptr;
    };
    api.UpdateCUDAProviderOptions = [](OrtCUDAProviderOptionsV2*, const char* const* keys, const char* const* values,
                                       std::size_t length) noexcept -> OrtStatus* {
        for (std::size_t index = 0; index < length; ++index) provider.options.back()[keys[index]] = values[index];
        return nullptr;
    };
    api.ReleaseCUDAProviderOptions = [](OrtCUDAProviderOptionsV2*) noexcept {};
    api.SessionOptionsAppendExecutionProvider_CUDA_V2 = [](OrtSessionOptions*,
                                                           const OrtCUDAProviderOptionsV2*) noexcept -> OrtStatus* {
        return provider.starts ? nullptr : failure("libcudnn.so.9: no such file");
    };
    api.CreateSession = [](const OrtEnv* environment, const char* path, const OrtSessionOptions* settings,
                           OrtSession** made) noexcept -> OrtStatus* {
        if (provider.options.empty()) return real().CreateSession(environment, path, settings, made);
        auto& options = provider.options.back();
        if (!provider.captures && options["enable_cuda_graph"] == "1")
            return failure("This session cannot use the graph capture feature as requested");
        OrtStatus* const status = real().CreateSession(environment, path, settings, made);
        if (!status)
            provider.streams[*made] = reinterpret_cast<cudaStream_t>(std::stoull(options["user_compute_stream"]));
        return status;
    };
    api.CreateMemoryInfo = [](const char* name, OrtAllocatorType type, int number, OrtMemType kind,
                              OrtMemoryInfo** made) noexcept -> OrtStatus* {
        if (name != std::string("Cuda")) return failure(name);
        provider.memory.push_back(number);
        return real().CreateMemoryInfo("Cpu", type, 0, kind, made);
    };
    api.AddRunConfigEntry = [](OrtRunOptions* settings, const char* key, const char* value) noexcept -> OrtStatus* {
        if (key == std::string("gpu_graph_id")) provider.graphs[settings] = value;
        return real().AddRunConfigEntry(settings, key, value);
    };
    api.RunWithBinding = [](OrtSession* session, const OrtRunOptions* settings,
                            const OrtIoBinding* binding) noexcept -> OrtStatus* {
        CudaDouble::here().finish(provider.streams.at(session));
        const std::string& graph = provider.graphs.at(settings);
        provider.runs[binding].push_back(graph);
        if (provider.fails.count(++provider.calls)) return failure("it failed");
        if (!provider.records && graph != "-1") return failure("it cannot be captured");
        return real().RunWithBinding(session, settings, binding);
    };
    if (!provider.places) return &api;
    const auto patch = [&](std::size_t place, auto* function) { table[place] = reinterpret_cast<void*>(function); };
    patch(
        PLACE, +[](const OrtSession*, const Place* const** parts, std::size_t* length) -> OrtStatus* {
            provider.pointers.clear();
            for (const Place& place : provider.placements) provider.pointers.push_back(&place);
            return *parts = provider.pointers.data(), *length = provider.pointers.size(), nullptr;
        });
    patch(PLACE + 1, +[](const Place* part, const char** name) -> OrtStatus* { return *name = part->first, nullptr; });
    patch(
        PLACE + 2, +[](const Place* part, const Place* const** nodes, std::size_t* length) -> OrtStatus* {
            static thread_local const Place* node;
            return node = part, *nodes = &node, *length = 1, nullptr;
        });
    patch(PLACE + 5, +[](const Place* node, const char** name) -> OrtStatus* { return *name = node->second, nullptr; });
    return version == 24 && provider.old ? nullptr : &api;
}

const char* ORT_API_CALL version_string() NO_EXCEPTION { return "1.31.1"; }

}  // namespace

// In the place of the library's.
extern "C" const OrtApiBase* ORT_API_CALL OrtGetApiBase() NO_EXCEPTION {
    static const OrtApiBase base = {doubled, version_string};
    return &base;
}
