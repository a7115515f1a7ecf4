#include "batcher.hpp"

#include <algorithm>
#include <cmath>

namespace dit_runtime {

Overloaded::Overloaded(double seconds)
    : std::runtime_error(
          text("too busy to finish in time; try again in ", std::max(0.1, std::ceil(10 * seconds) / 10), " s")),
      retry_after(seconds) {}

Batcher::Batcher(Pipeline& opened, Settings settings)
    : pipe(opened),
      clock_(settings.clock),
      memo_bytes_(settings.memo_bytes),
      memo_(opened.runner(), settings.memo_bytes),
      scheduler_(1, costs_) {
    std::vector<std::string> names = {pipe.manifest.size};
    for (const Manifest& other : pipe.manifest.sizes) names.push_back(other.size);
    std::size_t most = 0;
    for (const std::string& name : names) {
        Pipeline& at = pipe.at(name);
        const auto sized = sizes_.try_emplace(name, at, measure(at), settings.places).first;
        most = std::max(most, sized->second.places);
    }
    const double row = sizes_.at(names[0]).row;
    for (auto& entry : sizes_) entry.second.weight = entry.second.row / row;
    costs_.update("row", row);
    scheduler_.places = most;
    charged_ = clock_();
    thread_ = std::thread([this] { guarded_loop(); });
}

std::shared_ptr<Ticket> Batcher::submit(Request request, Submission submission) {
    const double now = clock_();
    Sized& sized = sizes_.at(pipe.manifest.at(request.size).size);
    const Manifest& manifest = sized.pipe.manifest;
    if (!submission.latents) sized.pipe.require_decoder();
    const Checked checked = check(manifest, request);
    const auto ticket = std::make_shared<Ticket>();
    const std::size_t samples = checked.condition.rows, groups = checked.negative.rows ? 2 : 1;
    ticket->evaluations_ = static_cast<int>(checked.timesteps.size());
    ticket->rows_ = checked.timesteps.size() * groups;
    ticket->samples = static_cast<double>(samples);
    ticket->left = ticket->samples * static_cast<double>(ticket->rows_);
    ticket->kind = {manifest.size, groups};
    ticket->places = samples;
    ticket->most = sized.places;
    ticket->weight = sized.weight;
    ticket->sized_ = &sized;
    ticket->arrived = now;
    if (submission.deadline) ticket->deadline = now + *submission.deadline;
    ticket->request_ = std::move(request);
    ticket->latents_ = submission.latents;
    ticket->listener_ = std::move(submission.listener);
    ticket->ended_ = std::move(submission.ended);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) throw Closed("this bundle takes no more requests");
    if (const double late = scheduler_.lateness(*ticket); late > 0) {
        ++counts_.refused;
        throw Overloaded(late);
    }
    scheduler_.push(ticket);
    wake_.notify_one();
    return ticket;
}

double Batcher::lateness(double deadline) const {
    Job any;
    any.samples = 0;
    any.arrived = clock_();
    any.deadline = any.arrived + deadline;
    const std::lock_guard<std::mutex> lock(mutex_);
    return scheduler_.lateness(any);
}

void Batcher::count_refused() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counts_.refused;
}

void Batcher::close(bool drain) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        closing_ = true;
        if (!drain) {
            for (const auto& ticket : scheduler_.jobs) ticket->cancel();
            for (const auto& ticket : undecoded_) ticket->cancel();
        }
        wake_.notify_one();
    }
    const std::lock_guard<std::mutex> lock(closer_);  // of two who close, one comes second
    if (thread_.joinable()) thread_.join();
}

Batcher::Counts Batcher::counts() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Counts counts = counts_;
    for (const auto& ticket : scheduler_.jobs) ++(ticket->started ? counts.active : counts.queued);
    counts.active += undecoded_.size();
    counts.memo_hits = memo_.hits;
    counts.memo_misses = memo_.misses;
    return counts;
}

}  // namespace dit_runtime
