// What the batcher itself takes, in processor time of a sample and step: `cost BUNDLE [ROUNDS]`, the twin of
// tests/serve/cost.py. More rounds are for a profile: `perf record cost BUNDLE 200`.
//
// Its engines are there at once with zeros, so that all time is the library's: requests, solvers, stacking, scheduling.
#include <array>
#include <cstdlib>
#include <ctime>
#include <iostream>
#include <random>

#include "batcher.hpp"

namespace dit_runtime {

// An engine whose answers are there at once: zeros of the right shapes.
class Free : public Engine {
  public:
    Free(const Stage& stage, const Engine& own) : stage_(stage) { inputs = own.inputs, outputs = own.outputs; }

    std::map<std::string, Output> run(const std::vector<Input>& arrays) override {
        const auto rows = static_cast<std::size_t>(arrays.at(0).shape[0]);
        std::map<std::string, Output> answers;
        for (const TensorSpec& spec : stage_.gives) {
            const Shape shape = with_rows(rows, spec.row());
            answers[spec.name] = {shape, std::vector<float>(count(shape))};
        }
        return answers;
    }

  private:
    const Stage& stage_;
};

struct EngineDouble {
    static void free(Pipeline& pipe, const Stage& stage) {
        std::unique_ptr<Engine>& engine = pipe.opened_->engines.at(stage.name);
        engine = std::make_unique<Free>(stage, *engine);
    }
};

}  // namespace dit_runtime

namespace {

namespace dit = dit_runtime;

constexpr std::size_t COUNT = 32;

double processor_time(clockid_t clock) {
    timespec time = {};
    clock_gettime(clock, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

std::vector<dit::Request> requests() {
    std::mt19937 choose(0);
    std::vector<dit::Request> requests(COUNT);
    for (std::size_t number = 0; number < COUNT; ++number) {
        requests[number].labels = {static_cast<std::int64_t>(number % 5)};
        requests[number].steps = std::array<int, 3>{10, 25, 50}[choose() % 3];
        requests[number].guidance = {std::array<float, 3>{2, 4, 6}[choose() % 3]};
        requests[number].seeds = {number};
    }
    return requests;
}

// Returns the seconds before and after the steps.
double draw(dit::Batcher& batcher) {
    dit::Batcher::Tickets tickets;
    for (dit::Request& request : requests()) tickets.push_back(batcher.submit(std::move(request)));
    double beside = 0;
    for (const auto& ticket : tickets) {
        ticket->result();
        beside += ticket->stats().conditions + ticket->stats().decode;
    }
    return beside;
}

}  // namespace

int main(int count, char** words) try {
    if (count < 2) throw std::runtime_error("usage: cost BUNDLE [ROUNDS]");
    const int rounds = count > 2 ? std::atoi(words[2]) : 1;
    for (const std::size_t places : {1, 8}) {
        dit::Options options;
        options.threads = 1;
        dit::Pipeline pipe(words[1], options);
        dit::Batcher::Settings settings;
        settings.places = places;
        settings.clock = [] { return processor_time(CLOCK_THREAD_CPUTIME_ID); };
        dit::Batcher batcher(pipe, settings);
        draw(batcher);  // fills the memo
        dit::EngineDouble::free(pipe, pipe.manifest.step());
        dit::EngineDouble::free(pipe, *pipe.manifest.end());
        const std::size_t before = batcher.counts().samples;
        const double began = processor_time(CLOCK_PROCESS_CPUTIME_ID), own = processor_time(CLOCK_THREAD_CPUTIME_ID);
        double beside = 0;
        for (int round = 0; round < rounds; ++round) beside += draw(batcher);
        const double whole = processor_time(CLOCK_PROCESS_CPUTIME_ID) - began;
        const double stepping = whole - beside - (processor_time(CLOCK_THREAD_CPUTIME_ID) - own);
        const auto samples = static_cast<double>(batcher.counts().samples - before);
        std::cout << words[1] << ", " << places << " places: " << 1e6 * stepping / samples
                  << " us of a sample and step, " << 1e6 * whole / samples << " with all of the request\n";
    }
    return 0;
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
