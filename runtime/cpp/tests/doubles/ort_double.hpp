// Doubles of ONNX Runtime's CUDA provider: graphs run on the CPU, in memory that the test calls the GPU's.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "ort.hpp"
#include "pipeline.hpp"

using Place = std::pair<const char*, const char*>;  // provider, operator

// What the tests ask for, and what was done.
struct Provider {
    bool starts = true, captures = true, records = true, old = false;
    bool places = true;  // else the library itself says where nodes run
    std::vector<Place> placements = {{"CUDAExecutionProvider", "MatMul"}, {"CPUExecutionProvider", "Gather"}};
    std::vector<std::map<std::string, std::string>> options;  // by session
    std::map<const OrtSession*, cudaStream_t> streams;
    std::vector<int> memory;  // numbers of the GPUs
    std::map<const OrtRunOptions*, std::string> graphs;
    std::map<const OrtIoBinding*, std::vector<std::string>> runs;  // the graph of each, by binding
    std::vector<const Place*> pointers = {};
    std::set<int> fails;  // numbers of runs
    int calls = 0;        // runs
};
extern Provider provider;

// The library's own functions.
const OrtApi& real();

namespace dit_runtime {

inline Options options_for(const char* device) {
    Options options;
    options.backend = "onnxruntime", options.device = device, options.threads = 1;
    return options;
}

// Tests on clean doubles, which must leave nothing.
class OnDoubles : public testing::Test {
  protected:
    void SetUp() override {
        CudaDouble::here() = {};
        provider = {};
    }
    void TearDown() override {
        EXPECT_TRUE(CudaDouble::here().memory.empty());
        EXPECT_TRUE(CudaDouble::here().objects.empty());
        EXPECT_EQ(CudaDouble::here().foreign, 0);
        EXPECT_EQ(CudaDouble::here().pageable, 0);
        EXPECT_EQ(CudaDouble::current(), 0);
    }
};

}  // namespace dit_runtime
