#include "jobs.hpp"

#include <algorithm>
#include <ctime>

#include "errors.hpp"
#include "facts.hpp"

namespace server {

Jobs::Jobs(dit::Clock clock, double kept, std::size_t most, std::size_t most_bytes)
    : clock_(std::move(clock)),
      kept_(kept),
      most_(most),
      most_bytes_(most_bytes ? most_bytes : static_cast<std::size_t>(dit::limit("job_bytes"))) {}

Job& Jobs::add() {
    const double now = clock_();
    jobs_.remove_if([&](const Job& job) { return job.ended && now - job.ended > kept_; });
    if (jobs_.size() >= most_) {
        const auto oldest = std::find_if(jobs_.begin(), jobs_.end(), [](const Job& job) { return job.ended; });
        if (oldest == jobs_.end()) throw Fault{429, dit::text(most_, " jobs are under way"), "", {retry_after(5)}};
        jobs_.erase(oldest);
    }
    Job& job = jobs_.emplace_back();
    job.id = random_id();
    job.created = std::time(nullptr);
    return job;
}

void Jobs::finish(Job& job, const std::string& status, Json result) {
    if (job.drawing)
        for (const auto& ticket : job.drawing->tickets) job.steps_done += ticket->done();
    job.drawing.reset();
    job.status = status;
    job.result = std::move(result);
    job.ended = clock_();
    if (job.result.contains("data"))
        for (const Json& image : job.result["data"])
            job.bytes += image["b64_json"].get_ref<const std::string&>().size();
    std::vector<const Job*> drawn;
    std::size_t total = 0;
    for (const Job& each : jobs_)
        if (each.bytes) drawn.push_back(&each), total += each.bytes;
    std::stable_sort(drawn.begin(), drawn.end(),
                     [](const Job* one, const Job* other) { return one->ended < other->ended; });
    for (std::size_t place = 0; place + 1 < drawn.size() && total > most_bytes_; ++place) {
        total -= drawn[place]->bytes;
        forget(std::string(drawn[place]->id));
    }
}

Job& Jobs::get(const std::string& id) {
    for (Job& job : jobs_)
        if (job.id == id && (!job.ended || clock_() - job.ended <= kept_)) return job;
    throw Fault{404, "no job has this id; finished jobs are forgotten after a while"};
}

void Jobs::forget(const std::string& id) {
    jobs_.remove_if([&](const Job& job) { return job.id == id; });
}

Json Job::describe() const {
    int done = steps_done;
    if (drawing)
        for (const auto& ticket : drawing->tickets) done += ticket->done();
    Json table = {{"id", id},           {"object", "image.job"},
                  {"created", created}, {"status", status == "queued" && done ? "running" : status},
                  {"steps_done", done}, {"steps", steps}};
    if (status == "succeeded")
        table["result"] = result;
    else
        table.update(result);
    return table;
}

}  // namespace server
