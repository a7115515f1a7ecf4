// Times runs for tools/bench.py: `bench BUNDLE THREADS STEPS`, then one run for each line on standard input. A line of
// the answer holds the milliseconds of each step but the first.
#include <chrono>
#include <iostream>
#include <string>

#include "pipeline.hpp"

int main(int count, char** words) {
    using Clock = std::chrono::steady_clock;
    const auto milliseconds = [](Clock::duration time) {
        return std::chrono::duration<double, std::milli>(time).count();
    };
    if (count != 4) return 2;
    dit_runtime::Options options;
    options.threads = std::stoi(words[2]);
    dit_runtime::Pipeline pipe(words[1], options);
    dit_runtime::Request request;
    if (pipe.manifest.classes()) request.labels = {0};
    request.steps = std::stoi(words[3]);
    Clock::time_point last;
    request.on_step = [&](int step, int, const dit_runtime::Array&) {
        const Clock::time_point now = Clock::now();
        if (step > 1) std::cout << milliseconds(now - last) << ' ';
        last = now;
        return false;
    };
    std::cout << "ready" << std::endl;
    for (std::string line; std::getline(std::cin, line);) {
        pipe.latents(request);
        std::cout << std::endl;
    }
}
