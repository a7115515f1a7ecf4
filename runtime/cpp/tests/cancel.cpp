// How long dit_model_open goes on after dit_cancel: `cancel BUNDLE BACKEND [WARM]`. Each trial is a process of its own,
// which has loaded no engine before, and cancels at another time; then the same in one process, whose engines are
// loaded.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "dit/dit.h"

namespace {

using Clock = std::chrono::steady_clock;

double milliseconds(Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double, std::milli>(to - from).count();
}

struct Arguments {
    const char *bundle, *backend;
    int64_t warm;
};

// The milliseconds from the cancellation to the end of the call; below 0: it had ended before.
double cancel_after(const Arguments& arguments, double delay) {
    dit_cancellation* const cancellation = dit_cancellation_new();
    Clock::time_point end;
    dit_status status = DIT_OK;
    std::thread opening([&] {
        dit_open_options options = DIT_OPEN_OPTIONS_INIT;
        options.backend = arguments.backend;
        options.cancellation = cancellation;
        options.threads = 1;
        options.warm = &arguments.warm;
        options.num_warm = arguments.warm > 0;
        dit_model* model = nullptr;
        status = dit_model_open(arguments.bundle, &options, &model);
        end = Clock::now();
        dit_model_release(model);
    });
    std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(delay));
    const auto asked = Clock::now();
    dit_cancel(cancellation);
    opening.join();
    dit_cancellation_free(cancellation);
    return status == DIT_STOPPED ? milliseconds(asked, end) : -1;
}

void report(const char* what, std::vector<double> all) {
    all.erase(std::remove_if(all.begin(), all.end(), [](double each) { return each < 0; }), all.end());
    std::sort(all.begin(), all.end());
    if (all.empty()) return;
    std::printf("%s: %zu cancelled, median %.1f ms, most %.1f ms\n", what, all.size(), all[all.size() / 2], all.back());
}

// As in a process that has opened nothing yet.
double apart(const Arguments& arguments, double delay) {
    int ends[2] = {};
    if (pipe(ends)) return -1;
    const pid_t child = fork();
    if (child == 0) {
        const double spent = cancel_after(arguments, delay);
        if (write(ends[1], &spent, sizeof spent) != sizeof spent) _exit(1);
        std::exit(0);
    }
    double spent = -1;
    if (read(ends[0], &spent, sizeof spent) != sizeof spent) spent = -1;
    waitpid(child, nullptr, 0);
    close(ends[0]), close(ends[1]);
    return spent;
}

}  // namespace

int main(int count, char** words) {
    if (count < 3) {
        std::fprintf(stderr, "usage: cancel BUNDLE BACKEND [WARM]\n");
        return 2;
    }
    const Arguments arguments = {words[1], words[2], count > 3 ? std::atoll(words[3]) : 0};
    std::vector<double> fresh, loaded;
    double delay = 0;
    for (double last = 0; last >= 0 && delay < 20e3; delay = 1.1 * delay + 1)
        fresh.push_back(last = apart(arguments, delay));
    report("engines not loaded", fresh);
    cancel_after(arguments, delay);
    delay = 0;
    for (double last = 0; last >= 0 && delay < 20e3; delay = 1.1 * delay + 1)
        loaded.push_back(last = cancel_after(arguments, delay));
    report("engines loaded", loaded);
}
