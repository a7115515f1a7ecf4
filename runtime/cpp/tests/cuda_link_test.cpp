// ONNX Runtime's engine with CUDA's own runtime, which asks the driver: no double, and where no GPU is, a refusal.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "ort.hpp"

namespace dit_runtime {
namespace {

TEST(Cuda, NoGpuIsARefusal) {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess && count) GTEST_SKIP() << "a GPU is here";
    Options options;
    options.device = "cuda";
    try {
        ort::open_cuda(Path(BUNDLE) / "denoiser.onnx", Stage{}, options);
        FAIL() << "it opened";
    } catch (const UsageError& error) {
        const std::string said = error.what(), expected = "device 'cuda' did not start here: cuda";
        EXPECT_EQ(said.substr(0, expected.size()), expected) << said;
    }
    options.device = "cuda:x";
    EXPECT_THROW(ort::open_cuda(Path(BUNDLE) / "denoiser.onnx", Stage{}, options), UsageError);
}

}  // namespace
}  // namespace dit_runtime
