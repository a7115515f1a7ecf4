#include "metrics.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>

#include "errors.hpp"

namespace server {
namespace {

constexpr double BUCKETS[] = {0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120};
constexpr std::size_t COUNT = sizeof BUCKETS / sizeof *BUCKETS;

// As Python writes numbers: 3 is 3.0.
std::string shown(double value) {
    std::string text = dit_runtime::text(value);
    return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
}

void line(std::string& lines, const std::string& name, const std::string& labels, double value) {
    lines += name + (labels.empty() ? "" : "{" + labels + "}") + " " + shown(value) + "\n";
}

void head(std::string& lines, const std::string& name, const char* text, const char* type) {
    lines += "# HELP " + name + " " + text + "\n# TYPE " + name + " " + type + "\n";
}

void process(std::string& lines) {
    std::ifstream file("/proc/self/statm");
    double size = 0, resident = 0;
    file >> size >> resident;
    head(lines, "process_resident_memory_bytes", "resident memory", "gauge");
    line(lines, "process_resident_memory_bytes", "", resident * static_cast<double>(sysconf(_SC_PAGESIZE)));
    std::error_code error;
    std::size_t open = 0;
    for (std::filesystem::directory_iterator entry("/proc/self/fd", error), end; !error && entry != end; ++entry)
        ++open;
    head(lines, "process_open_fds", "open file descriptors", "gauge");
    line(lines, "process_open_fds", "", static_cast<double>(open));
    rusage used = {};
    getrusage(RUSAGE_SELF, &used);
    const auto seconds = [](const timeval& time) {
        return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
    };
    head(lines, "process_cpu_seconds_total", "user and system processor time", "counter");
    line(lines, "process_cpu_seconds_total", "", seconds(used.ru_utime) + seconds(used.ru_stime));
}

}  // namespace

void Histogram::observe(double seconds) {
    counts_.resize(COUNT + 1);
    std::size_t bucket = 0;
    while (bucket < COUNT && seconds > BUCKETS[bucket]) ++bucket;
    ++counts_[bucket];
    ++count_;
    sum_ += seconds;
}

void Histogram::write(std::string& lines, const std::string& name, const std::string& labels) const {
    std::size_t below = 0;
    for (std::size_t bucket = 0; bucket <= COUNT; ++bucket) {
        below += counts_[bucket];
        const std::string bound = bucket < COUNT ? shown(BUCKETS[bucket]) : "+Inf";
        line(lines, name + "_bucket", labels + ",le=\"" + bound + "\"", static_cast<double>(below));
    }
    line(lines, name + "_count", labels, static_cast<double>(count_));
    line(lines, name + "_sum", labels, sum_);
}

void Metrics::answer(const std::string& model, int code, double seconds) {
    ++requests_[{model, code}];
    latency_[model].observe(seconds);
}

std::string Metrics::scrape(const Models& models) const {
    std::string lines;
    head(lines, "dit_requests_total", "requests for images by answer", "counter");
    for (const auto& [key, number] : requests_)
        line(lines, "dit_requests_total", dit::text("model=\"", key.first, "\",code=\"", key.second, "\""),
             static_cast<double>(number));
    for (const auto& [name, help, table] :
         {std::make_tuple("dit_request_seconds", "from a request's head to its answer", &latency_),
          std::make_tuple("dit_queue_seconds", "until an image was started", &queue_)}) {
        head(lines, name, help, "histogram");
        for (const auto& [model, histogram] : *table) histogram.write(lines, name, "model=\"" + model + "\"");
    }
    struct Series {
        const char *name, *help, *type, *labels;
        std::function<double(const Model&, const dit::Batcher::Counts&)> value;
    };
    const auto count = [](std::size_t dit::Batcher::Counts::* what) {
        return [what](const Model&, const dit::Batcher::Counts& counts) { return static_cast<double>(counts.*what); };
    };
    using Counts = dit::Batcher::Counts;
    const std::vector<Series> all = {
        {"dit_images_total", "images drawn", "counter", "", count(&Counts::drawn)},
        {"dit_step_calls_total", "calls of the step stage", "counter", "", count(&Counts::calls)},
        {"dit_step_samples_total", "samples in these calls; by calls, the mean batch", "counter", "",
         count(&Counts::samples)},
        {"dit_step_rows_total", "rows in these calls: samples times groups of conditions", "counter", "",
         count(&Counts::rows)},
        {"dit_refused_requests_total", "refused because the deadline was out of reach", "counter", "",
         count(&Counts::refused)},
        {"dit_late_requests_total", "not finished by their deadline", "counter", "", count(&Counts::late)},
        {"dit_cancelled_requests_total", "left by their clients", "counter", "", count(&Counts::cancelled)},
        {"dit_failed_requests_total", "failed in an engine", "counter", "", count(&Counts::failed)},
        {"dit_stage_seconds_total", "in calls of a stage", "counter", ",stage=\"step\"",
         [](const Model&, const Counts& counts) { return counts.step; }},
        {"dit_stage_seconds_total", "", "", ",stage=\"decode\"",
         [](const Model&, const Counts& counts) { return counts.decode; }},
        {"dit_memo_rows_total", "rows of the stages before the loop", "counter", ",result=\"hit\"",
         count(&Counts::memo_hits)},
        {"dit_memo_rows_total", "", "", ",result=\"miss\"", count(&Counts::memo_misses)},
        {"dit_swaps_total", "bundles that took the place of others", "counter", ",result=\"swapped\"",
         [](const Model& model, const Counts&) { return static_cast<double>(model.swapped); }},
        {"dit_swaps_total", "", "", ",result=\"refused\"",
         [](const Model& model, const Counts&) { return static_cast<double>(model.refused); }},
        {"dit_queued_images", "waiting to be started", "gauge", "", count(&Counts::queued)},
        {"dit_active_images", "under way", "gauge", "", count(&Counts::active)},
        {"dit_batch_places", "samples that may share a call", "gauge", "",
         [](const Model& model, const Counts&) { return static_cast<double>(model.served->batcher->places()); }},
    };
    std::map<const Model*, Counts> counts;
    for (const auto& model : models) counts[model.get()] = model->served->batcher->counts();
    for (const Series& series : all) {
        if (*series.help) head(lines, series.name, series.help, series.type);
        for (const auto& model : models)
            line(lines, series.name, "model=\"" + model->name + "\"" + series.labels,
                 series.value(*model, counts[model.get()]));
    }
    head(lines, "dit_bundle_info", "1, by the manifest's sha256", "gauge");
    for (const auto& model : models)
        line(lines, "dit_bundle_info", dit::text("model=\"", model->name, "\",sha256=\"", model->served->sha256, "\""),
             1);
    process(lines);
    return lines;
}

}  // namespace server
