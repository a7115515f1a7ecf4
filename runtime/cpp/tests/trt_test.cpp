// The engine of either TensorRT on doubles of TensorRT and of CUDA: no GPU has run it. Mirrors
// tests/tensorrt/test_resident.py.
#include <NvInferRuntime.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "engine.hpp"
#include "errors.hpp"

namespace dit_runtime {
namespace {

using nvinfer1::Double;
using Values = std::vector<float>;

class Trt : public testing::Test {
  protected:
    void SetUp() override {
        CudaDouble::here() = {};
        Double::here() = {};
        folder_ = std::filesystem::temp_directory_path() / ("dit-trt-" + std::to_string(getpid()));
        std::filesystem::create_directories(folder_);
        std::ofstream(folder_ / "step.engine") << "a plan";
        Built built;
        built.version = trt_version();
        stage_.built[DIT_TENSORRT] = built;
    }
    void TearDown() override {
        EXPECT_TRUE(CudaDouble::here().memory.empty());
        EXPECT_TRUE(CudaDouble::here().objects.empty());
        EXPECT_EQ(Double::here().contexts, 0);
        EXPECT_EQ(CudaDouble::here().foreign, 0);
        EXPECT_EQ(CudaDouble::here().pageable, 0);
        std::filesystem::remove_all(folder_);
    }

    std::unique_ptr<Engine> open(const std::string& device = "", const Path& cache = {}) const {
        Options options;
        options.device = device, options.cache = cache;
        return open_trt({folder_ / "step.engine"}, stage_, options);
    }

    // y for rows that count from `first`, with a table that is `column` in its last group.
    static Values run(Engine& engine, std::int64_t rows, float first = 0, float column = 0, std::int64_t groups = 1,
                      std::uint64_t version = 0) {
        Values x(static_cast<std::size_t>(3 * rows), first), table(static_cast<std::size_t>(2 * rows * groups), -1);
        std::fill(table.end() - 2 * rows, table.end(), column);
        const Output y =
            engine.run({{"x", {rows, 3}, x.data()}, {"table", {groups, rows, 2}, table.data(), false, version}})
                .at("y");
        std::fill(x.begin(), x.end(), 99.f);  // they are the caller's again
        EXPECT_EQ(y.shape, (Shape{rows, 3}));
        return y.values;
    }
    static Values all(std::int64_t rows, float value) { return Values(static_cast<std::size_t>(3 * rows), value); }
    static std::ptrdiff_t uploads(std::size_t bytes) {
        const auto& copies = CudaDouble::here().copies;
        return std::count_if(copies.begin(), copies.end(), [&](const CudaDouble::Copy& copy) {
            return copy.kind == cudaMemcpyHostToDevice && copy.bytes == bytes;
        });
    }

    std::filesystem::path folder_;
    Stage stage_;
};

TEST_F(Trt, AnyShapeOfAnyProfile) {
    const auto engine = open();
    EXPECT_EQ(engine->inputs, (std::vector<std::string>{"x", "table"}));
    for (int turn = 0; turn < 3; ++turn)
        for (std::int64_t rows = 1; rows <= 4; ++rows)
            for (std::int64_t groups = 1; groups <= 2; ++groups) {
                const float first = static_cast<float>(10 * turn + rows), column = static_cast<float>(turn + groups);
                EXPECT_EQ(run(*engine, rows, first, column, groups), all(rows, 2 * first + column));
            }
    EXPECT_THROW(run(*engine, 5), UsageError);
}

TEST_F(Trt, WhatStaysIsSentOnce) {
    const auto engine = open();
    const std::size_t bytes = 2 * 2 * sizeof(float);
    for (int step = 0; step < 4; ++step) EXPECT_EQ(run(*engine, 2, 1, 5, 1, 7), all(2, 7));
    EXPECT_EQ(uploads(bytes), 1);
    EXPECT_EQ(run(*engine, 2, 1, 6, 1, 8), all(2, 8));
    EXPECT_EQ(uploads(bytes), 2);
    for (int step = 0; step < 2; ++step) EXPECT_EQ(run(*engine, 2, 1, 4), all(2, 6));  // of no version
    EXPECT_EQ(uploads(bytes), 4);
    EXPECT_EQ(run(*engine, 2, 1, 5, 1, 7), all(2, 7));
}

TEST_F(Trt, ARunThatFailsCanBeTriedAgain) {
    const auto engine = open();
    std::int64_t rows = 0;
    for (const char* const call : {"setInputShape", "setTensorAddress", "getTensorShape", "enqueueV3"}) {
        Double::here().refuses = call;
        const auto version = static_cast<std::uint64_t>(++rows);
        EXPECT_THROW(run(*engine, rows, 1, 5, 1, version), EngineError) << call;
        EXPECT_EQ(run(*engine, rows, 2, 5, 1, version), all(rows, 9)) << call;
    }
}

TEST_F(Trt, ArraysStayOnTheDevice) {
    const auto engine = open("cuda:1");
    auto& resident = dynamic_cast<Resident&>(*engine);
    Values numbers = {1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4};
    const DeviceRows x = resident.put({"x", {4, 3}, numbers.data()});
    const DeviceRows table = resident.put({"table", {6, 2}, numbers.data()});
    std::fill(numbers.begin(), numbers.end(), 99.f);  // they are the caller's again
    const DeviceRows y = resident.empty({4, 3}, false);
    const auto input = [](const char* name, const DeviceRows& rows) {
        Input made{name, rows.shape(), nullptr};
        made.device = &rows;
        return made;
    };
    const DeviceRows chosen = x.take({3, 1}, {2}), wide = table.take({1, 5}, {1, 2});  // the tables' rows of 1 and 4
    CudaDouble::here().copies.clear();
    for (int step = 0; step < 4; ++step)
        resident.run_into({input("x", chosen), input("table", wide)}, {{"y", y.slice(1, 3)}});
    for (const auto& copy : CudaDouble::here().copies) EXPECT_EQ(copy.kind, cudaMemcpyDeviceToDevice);
    EXPECT_EQ(y.slice(1, 3).home(), (Values{9, 9, 9, 8, 8, 8}));
    EXPECT_THROW(resident.run_into({input("x", chosen), input("table", wide)}, {{"y", y.slice(1, 2)}}), EngineError);
    Options options;
    options.device = "cuda:1", options.stream = resident.stream();
    const auto other = open_trt({folder_ / "step.engine"}, stage_, options);
    EXPECT_EQ(dynamic_cast<Resident&>(*other).stream(), resident.stream());
}

TEST_F(Trt, TheCallersDeviceStays) {
    for (const int device : {0, 1}) {
        auto engine = open("cuda:" + std::to_string(device));
        EXPECT_EQ(CudaDouble::current(), 0);
        run(*engine, 2);
        EXPECT_EQ(CudaDouble::current(), 0);
        for (const auto& [memory, block] : CudaDouble::here().memory) EXPECT_EQ(block.device, device);
        engine.reset();
        EXPECT_EQ(CudaDouble::current(), 0);
    }
    EXPECT_THROW(open("cuda:2"), UsageError);
}

TEST_F(Trt, NoTraceOfLayersIsKept) {
    run(*open(), 2);
    EXPECT_EQ(Double::here().verbosities, std::vector{nvinfer1::ProfilingVerbosity::kNONE});
}

TEST_F(Trt, WhatDoesNotOpenLeavesNothing) {
    for (int room = 0; room < 4; ++room) {
        CudaDouble::here().room = room;
        EXPECT_THROW(open("cuda:1"), EngineError) << room;
        EXPECT_EQ(CudaDouble::current(), 0);
        EXPECT_TRUE(CudaDouble::here().memory.empty());
    }
    CudaDouble::here().room = -1;
    Double::here().opens = false;
    EXPECT_THROW(open(), BundleError);
    EXPECT_THROW(open_trt({folder_ / "step.engine", folder_ / "step.onnx"}, stage_, {}), BundleError);  // stripped
    CudaDouble::here().devices = 0;
    EXPECT_THROW(open(), BundleError);
}

#ifdef DOUBLE_OF_RTX
TEST_F(Trt, KernelsAreKeptForTheNextOne) {
    const Path cache = folder_ / "user" / "bundle";
    std::unique_ptr<Engine> engine = open("", cache);
    run(*engine, 2);
    EXPECT_FALSE(std::filesystem::exists(cache));  // nothing is written yet
    engine.reset();
    EXPECT_EQ(std::filesystem::status(cache).permissions(), std::filesystem::perms::owner_all);
    EXPECT_TRUE(Double::here().kernels.empty());
    run(*open("", cache), 2);
    EXPECT_EQ(Double::here().kernels, std::vector<std::string>{"compiled"});
    std::size_t files = 0;
    for (const auto& file : std::filesystem::directory_iterator(cache)) files += file.is_regular_file();
    EXPECT_EQ(files, 1u);  // and no part of one
    EXPECT_EQ(Double::here().eager, 2);
    EXPECT_EQ(Double::here().whole_graphs, 2);
    EXPECT_EQ(CudaDouble::here().instantiated, 0);  // it captures by itself
    std::filesystem::remove(cache / "step.kernels.bin");
    std::filesystem::create_directory(cache / "step.kernels.bin");  // it cannot be read, nor written
    EXPECT_EQ(run(*open("", cache), 2, 1), all(2, 2));
}

TEST_F(Trt, HalfWrittenKernelsAreNotKept) {
    std::ofstream(folder_ / "step.kernels.bin") << "old";
    rlimit before{};
    ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
    const rlimit short_of_room{4, before.rlim_max};
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);  // writing then fails, as on a full disk
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &short_of_room), 0);
    run(*open("", folder_), 2);
    setrlimit(RLIMIT_FSIZE, &before);
    std::signal(SIGXFSZ, handler);
    EXPECT_EQ(std::filesystem::file_size(folder_ / "step.kernels.bin"), 3u);
    std::size_t files = 0;
    for (const auto& file : std::filesystem::directory_iterator(folder_)) files += file.is_regular_file();
    EXPECT_EQ(files, 2u);
}
#else
TEST_F(Trt, EachShapeIsCapturedOnce) {
    const auto engine = open();
    for (int step = 0; step < 10; ++step)
        for (const std::int64_t rows : {2, 2, 1}) {
            const float first = static_cast<float>(step);
            EXPECT_EQ(run(*engine, rows, first, 1, 2), all(rows, 2 * first + 1));
        }
    EXPECT_EQ(CudaDouble::here().instantiated, 2);
    EXPECT_EQ(CudaDouble::here().launches, 10 * 3 - 2 * 2);
}

TEST_F(Trt, WhatCannotBeCapturedRuns) {
    const auto run_all = [](Engine& engine) {
        for (int step = 0; step < 4; ++step) EXPECT_EQ(run(engine, 2, 1, 3), all(2, 5));
        EXPECT_EQ(CudaDouble::here().instantiated, 0);
    };
    stage_.built[DIT_TENSORRT].weight_streaming = true;  // which waits for weights
    run_all(*open());
    stage_.built[DIT_TENSORRT].weight_streaming = false;
    CudaDouble::here().captures = false;
    std::string lines;
    set_log([&](Severity, const std::string& line) { lines += line + "\n"; }, Severity::WARNING);
    run_all(*open());
    set_log({}, Severity::WARNING);
    EXPECT_EQ(lines,
              "no CUDA graph of tensorrt's work, it runs without: cudaStreamBeginCapture: cudaErrorOfTheDouble\n");
}
#endif

}  // namespace
}  // namespace dit_runtime
