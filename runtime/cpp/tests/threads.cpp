// What threads that draw with one model cost: `threads BUNDLE BACKEND THREADS STEPS`. Prints the most bytes that the
// process had in memory, how often the model answered meanwhile, and the slowest of these answers in milliseconds.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "dit/dit.hpp"

namespace {

void require(dit_status status) {
    if (status == DIT_OK) return;
    std::fprintf(stderr, "%s: %s\n", dit_status_name(status), dit_last_message());
    std::exit(1);
}

// Of this process alone: getrusage's starts with what its parent had.
long long most_resident() {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;)
        if (word == "VmHWM:" && status >> word) return 1024 * std::atoll(word.c_str());
    return 0;
}

void draw(dit_model* model, int steps, std::size_t numbers, std::uint64_t seed) {
    const std::int64_t label = 0;
    dit_request request = DIT_REQUEST_INIT;
    request.labels = &label, request.count = 1;
    request.seeds = &seed, request.num_seeds = 1;
    request.steps = steps;
    std::vector<float> latents(numbers);
    require(dit_model_generate_latents(model, &request, latents.data(), latents.size()));
}

}  // namespace

int main(int count, char** words) {
    if (count != 5) {
        std::fprintf(stderr, "usage: threads BUNDLE BACKEND THREADS STEPS\n");
        return 2;
    }
    dit_open_options options = DIT_OPEN_OPTIONS_INIT;
    options.backend = words[2];
    options.threads = 1;
    dit_model* model = nullptr;
    require(dit_model_open(words[1], &options, &model));
    dit_info info = DIT_INFO_INIT;
    require(dit_model_info(model, &info));
    std::size_t numbers = 1;
    for (int axis = 0; axis < info.state_rank; ++axis) numbers *= static_cast<std::size_t>(info.state_shape[axis]);

    const int number = std::atoi(words[3]), steps = std::atoi(words[4]);
    std::atomic<int> drawing{number};
    std::vector<std::thread> threads;
    for (int thread = 0; thread < number; ++thread)
        threads.emplace_back([&, thread] {
            draw(model, steps, numbers, static_cast<std::uint64_t>(thread));
            --drawing;
        });
    long long answers = 0;
    double slowest = 0;
    for (; drawing; ++answers) {
        const auto asked = std::chrono::steady_clock::now();
        require(dit_model_info(model, &info));
        const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - asked;
        slowest = std::max(slowest, spent.count());
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    for (std::thread& thread : threads) thread.join();
    dit_model_release(model);
    std::printf("%lld %lld %.3f\n", most_resident(), answers, slowest);
}
