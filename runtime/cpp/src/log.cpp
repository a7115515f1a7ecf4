#include "log.hpp"

#include "errors.hpp"

#include <memory>
#include <mutex>

namespace dit_runtime {
namespace {

struct Sink {
    OnLog on_log;
    Severity least;
};

std::mutex mutex;
std::shared_ptr<const Sink> current;  // of the process

}  // namespace

void set_log(OnLog on_log, Severity least) {
    auto sink = on_log ? std::make_shared<const Sink>(Sink{std::move(on_log), least}) : nullptr;
    const std::lock_guard<std::mutex> lock(mutex);
    current.swap(sink);
}

void log(Severity severity, const std::string& line) {
    std::shared_ptr<const Sink> sink;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        sink = current;
    }
    if (sink && severity <= sink->least) sink->on_log(severity, one_line(line));
}

}  // namespace dit_runtime
