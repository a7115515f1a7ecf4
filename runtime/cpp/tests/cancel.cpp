// How long calls go on after dit_cancel: `cancel BUNDLE BACKEND [WARM]`. Each trial of dit_model_open is a process of
// its own, which has loaded no engine before, and cancels at another time; then the same in one process, whose engines
// are loaded; then dit_model_verify, and dit_model_generate of one picture.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
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

using Call = std::function<dit_status(dit_cancellation*)>;

// The milliseconds from the cancellation to the end of the call; below 0: it had ended before.
double cancel_after(const Call& call, double delay) {
    dit_cancellation* const cancellation = dit_cancellation_new();
    Clock::time_point end;
    dit_status status = DIT_OK;
    std::thread calling([&] {
        status = call(cancellation);
        end = Clock::now();
    });
    std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(delay));
    const auto asked = Clock::now();
    dit_cancel(cancellation);
    calling.join();
    dit_cancellation_free(cancellation);
    return status == DIT_STOPPED ? milliseconds(asked, end) : -1;
}

dit_status open(const Arguments& arguments, dit_cancellation* cancellation, dit_model** model) {
    dit_open_options options = DIT_OPEN_OPTIONS_INIT;
    options.backend = arguments.backend;
    options.cancellation = cancellation;
    options.threads = 1;
    options.warm = &arguments.warm;
    options.num_warm = arguments.warm > 0;
    return dit_model_open(arguments.bundle, &options, model);
}

void report(const char* what, std::vector<double> all) {
    all.erase(std::remove_if(all.begin(), all.end(), [](double each) { return each < 0; }), all.end());
    std::sort(all.begin(), all.end());
    if (all.empty()) return;
    std::printf("%s: %zu cancelled, median %.1f ms, most %.1f ms\n", what, all.size(), all[all.size() / 2], all.back());
}

// As in a process that has opened nothing yet.
double apart(const Call& call, double delay) {
    int ends[2] = {};
    if (pipe(ends)) return -1;
    const pid_t child = fork();
    if (child == 0) {
        const double spent = cancel_after(call, delay);
        if (write(ends[1], &spent, sizeof spent) != sizeof spent) _exit(1);
        std::exit(0);
    }
    double spent = -1;
    if (read(ends[0], &spent, sizeof spent) != sizeof spent) spent = -1;
    int status = 0;
    waitpid(child, &status, 0);
    if (status) {
        std::fprintf(stderr, "cancelled after %.1f ms, a process ended with status %d\n", delay, status);
        std::exit(1);
    }
    close(ends[0]), close(ends[1]);
    return spent;
}

// The processor's milliseconds that this process took so far.
double processor() {
    std::timespec spent{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
    return 1e3 * static_cast<double>(spent.tv_sec) + 1e-6 * static_cast<double>(spent.tv_nsec);
}

// Waits until what a cancelled call left is done, so that the next one does not share the cores with it.
void settle() {
    for (double before = processor();; before = processor()) {
        std::this_thread::sleep_for(std::chrono::milliseconds(30));
        if (processor() - before < 3) return;
    }
}

// Cancels later and later, until the call ends first.
void measure(const char* what, const Call& call, double (*cancelled)(const Call&, double)) {
    std::vector<double> all;
    double delay = 0;
    for (double last = 0; last >= 0 && delay < 20e3; delay = 1.1 * delay + 1)
        all.push_back(last = cancelled(call, delay)), settle();
    report(what, all);
}

}  // namespace

int main(int count, char** words) {
    if (count < 3) {
        std::fprintf(stderr, "usage: cancel BUNDLE BACKEND [WARM]\n");
        return 2;
    }
    const Arguments arguments = {words[1], words[2], count > 3 ? std::atoll(words[3]) : 0};
    dit_model* model = nullptr;
    const Call opening = [&](dit_cancellation* cancellation) {
        dit_model* opened = nullptr;
        const dit_status status = open(arguments, cancellation, &opened);
        dit_model_release(opened);
        return status;
    };
    measure("open, engines not loaded", opening, apart);
    if (open(arguments, nullptr, &model) != DIT_OK) {
        std::fprintf(stderr, "%s\n", dit_last_message());
        return 1;
    }
    measure("open, engines loaded", opening, cancel_after);
    const Call verifying = [&](dit_cancellation* cancellation) {
        dit_verify_options options = DIT_VERIFY_OPTIONS_INIT;
        options.cancellation = cancellation;
        return dit_model_verify(model, &options);
    };
    measure("verify", verifying, cancel_after);
    dit_info info = DIT_INFO_INIT;
    dit_model_info(model, &info);
    std::vector<uint8_t> pixels(static_cast<size_t>(info.image_shape[0] * info.image_shape[1] * info.image_shape[2]));
    const int64_t label = 0;
    const Call drawing = [&](dit_cancellation* cancellation) {
        dit_request request = DIT_REQUEST_INIT;
        request.labels = &label, request.count = 1;
        request.cancellation = cancellation;
        return dit_model_generate(model, &request, pixels.data(), pixels.size());
    };
    measure("generate", drawing, cancel_after);
    dit_model_release(model);
}
