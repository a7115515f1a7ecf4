// ONNX Runtime's C API with owners, and the engine on it. Mirrors dit_runtime/backends/ort.py.
#pragma once

#include <onnxruntime_c_api.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine.hpp"
#include "errors.hpp"

namespace dit_runtime::ort {

// The functions, or a refusal where the library is older than these headers.
const OrtApi& api();

struct OrtFailure : EngineError {
    using EngineError::EngineError;
};

void check(OrtStatus* status);

template <typename T, void (*OrtApi::*release)(T*)>
struct Release {
    void operator()(T* pointer) const { (api().*release)(pointer); }
};

using Settings = std::unique_ptr<OrtSessionOptions, Release<OrtSessionOptions, &OrtApi::ReleaseSessionOptions>>;
using Session = std::unique_ptr<OrtSession, Release<OrtSession, &OrtApi::ReleaseSession>>;
using Memory = std::unique_ptr<OrtMemoryInfo, Release<OrtMemoryInfo, &OrtApi::ReleaseMemoryInfo>>;
using Value = std::unique_ptr<OrtValue, Release<OrtValue, &OrtApi::ReleaseValue>>;
using Info = std::unique_ptr<OrtTensorTypeAndShapeInfo,
                             Release<OrtTensorTypeAndShapeInfo, &OrtApi::ReleaseTensorTypeAndShapeInfo>>;
using Binding = std::unique_ptr<OrtIoBinding, Release<OrtIoBinding, &OrtApi::ReleaseIoBinding>>;
using RunOptions = std::unique_ptr<OrtRunOptions, Release<OrtRunOptions, &OrtApi::ReleaseRunOptions>>;

using ProviderOptions = std::map<std::string, std::string>;

// The CUDA provider's options: fp32 is multiplied as fp32, and convolutions are not timed at the first run.
ProviderOptions cuda_options(int device);

// Arrays cross from the host's memory and back in every run.
class OrtEngine : public Engine {
  public:
    // `more` is for the provider.
    OrtEngine(const Path& path, const Options& options, const ProviderOptions& more = {});

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override;
    void stop() noexcept override;
    void resume() noexcept override;

  protected:
    static Value value(const Input& input, void* data, const OrtMemoryInfo* memory);

    Session session_;

  private:
    std::vector<std::string> names(decltype(OrtApi::SessionGetInputCount) OrtApi::* size,
                                   decltype(OrtApi::SessionGetInputName) OrtApi::* get) const;

    Memory memory_;
    RunOptions running_;
};

// Where ONNX Runtime runs a node.
struct Placement {
    std::string provider, op;
};

// All nodes of a session that was made with "session.record_ep_graph_assignment_info".
std::vector<Placement> placements(const OrtSession* session);

// Refuses a session that left heavy nodes to the CPU.
void require_placement(const Path& path, const std::vector<Placement>& placements);

#ifdef DIT_CUDA
// Arrays stay in memory of the GPU; what an input's version says is there already is not sent again.
std::unique_ptr<Engine> open_cuda(const Path& path, const Stage& stage, const Options& options);
#endif

}  // namespace dit_runtime::ort
