// A pipeline on the tests' bundle through the C ABI, with each engine that the library has.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "dit/dit.h"

constexpr std::size_t PIXELS = 32 * 32 * 3, NUMBERS = 2 * 4 * 4;

struct Free {
    void operator()(dit_pipeline* pipe) const { dit_free(pipe); }
};
using Handle = std::unique_ptr<dit_pipeline, Free>;

// Both engines, as far as this library has them.
class Api : public ::testing::TestWithParam<const char*> {
  protected:
    explicit Api(const char* path = BUNDLE) : bundle(path) {}

    void SetUp() override {
        if (std::string(dit_backends()).find(GetParam()) == std::string::npos)
            GTEST_SKIP() << GetParam() << " was not found when the library was built";
        options.backend = GetParam();
        options.threads = 1;
        pipe.reset(dit_new());
        ASSERT_EQ(dit_open(pipe.get(), bundle, &options), DIT_OK) << dit_message(pipe.get());
        request.labels = labels;
        request.count = 2;
        request.steps = 4;
    }

    std::vector<float> latents() {
        std::vector<float> numbers(request.count * NUMBERS);
        EXPECT_EQ(dit_generate_latents(pipe.get(), &request, numbers.data(), numbers.size()), DIT_OK)
            << dit_message(pipe.get());
        return numbers;
    }

    // The call fails in this way, with a sentence that holds the words; and the pipeline works afterwards.
    void refused(dit_status status, dit_status expected, const std::string& words) {
        EXPECT_STREQ(dit_status_name(status), dit_status_name(expected)) << dit_message(pipe.get());
        EXPECT_NE(std::string(dit_message(pipe.get())).find(words), std::string::npos) << dit_message(pipe.get());
        const dit_request before = request;
        request = DIT_REQUEST_INIT;
        request.labels = labels;
        request.count = 1;
        request.steps = 2;
        latents();
        EXPECT_STREQ(dit_message(pipe.get()), "");
        request = before;
    }

    dit_status generate() { return dit_generate_latents(pipe.get(), &request, numbers, std::size(numbers)); }

    const char* const bundle;
    dit_open_options options = DIT_OPEN_OPTIONS_INIT;
    dit_request request = DIT_REQUEST_INIT;
    Handle pipe;
    int64_t labels[8] = {1, 3, 0, 2, 4, 1, 1, 0};
    float numbers[8 * NUMBERS] = {};
    uint8_t pixels[2 * PIXELS] = {};
};
