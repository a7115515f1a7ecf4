// Which requests share the next call of the step stage, and whether another one can be finished in time.
// Mirrors dit_runtime/serve/scheduler.py line by line.
//
// Nothing here runs an engine or reads a clock; the batcher does both.
//
// A job that arrives at time a with w seconds of work is due at a + STRETCH · w, and the earliest due goes first. So a
// short request passes a long one that is under way, and no request waits for all that come after it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace dit_runtime {

// As facts.json has them; not for use before main.
extern const double STRETCH;  // times its work: the latency up to which a job goes before all later ones
// Shares of the time up to a deadline. MARGIN: for what is ahead of a newcomer, by an estimate. PASSED: for what comes
// later and goes first; the rest is for its own steps, one after the other.
extern const double MARGIN, PASSED;
extern const double FAST, SLOW;  // weights of a new value in two running means; the larger mean counts

// Jobs of one kind can share a call: the size that they draw, and the number of groups in their next call.
using Kind = std::pair<std::string, std::size_t>;

// A request in the scheduler. A row is a sample in one group of conditions: a guided sample has two.
struct Job {
    double samples = 1;
    double left = 0;  // rows that are still to be evaluated
    Kind kind = {"", 2};
    std::size_t places = 1;      // in its next call; a sample takes two where its groups are evaluated as samples
    std::size_t most = 1 << 30;  // places of a call of its kind, where that is fewer than the scheduler's
    double weight = 1;           // of its rows and pictures, in those of the first size
    double arrived = 0;
    std::optional<double> deadline = {};
    bool started = false;
    double due = 0;  // set by the scheduler
};

// Seconds of work, from running means of seconds and of units; the slower of a fast mean and of a slow one.
class Costs {
  public:
    // Learns that so many units took so many seconds; a call with many units counts for more than one with few.
    void update(const std::string& what, double seconds, double units = 1.0);
    // The seconds of a "row", of a "start", or of the "decode" of a sample; 0 before any was measured.
    double operator()(const std::string& what) const;

  private:
    struct Mean {
        double weight, seconds, units;  // of a new value
    };
    std::map<std::string, std::vector<Mean>> means_;
};

// Jobs in the order in which they are due.
template <typename AnyJob>
class Scheduler {
  public:
    using Jobs = std::vector<std::shared_ptr<AnyJob>>;

    // `places` is the number of samples that one call has at most.
    Scheduler(std::size_t places, Costs& costs) : places(places), costs(costs) {}

    void push(std::shared_ptr<AnyJob> job) {
        job->due = due(*job);
        const auto later = [](double due, const auto& other) { return due < other->due; };
        jobs.insert(std::upper_bound(jobs.begin(), jobs.end(), job->due, later), std::move(job));
    }

    void remove(const std::shared_ptr<AnyJob>& job) { jobs.erase(std::find(jobs.begin(), jobs.end(), job)); }

    // The jobs of the next call: the first one due, and of its kind those that fit.
    //
    // At most twice as many are under way as fit one call, because each holds memory.
    Jobs pick() const {
        std::size_t under_way = 0;
        for (const auto& job : jobs) under_way += job->started ? job->places : 0;
        Jobs picked;
        std::size_t free = places;
        for (const auto& job : jobs) {
            if (!job->started && under_way && under_way + job->places > 2 * places) continue;
            if (!picked.empty() && (job->kind != picked[0]->kind || job->places > free)) continue;
            under_way += job->started ? 0 : job->places;
            if (picked.empty()) free = std::min(free, job->most);
            free -= std::min(free, job->places);
            picked.push_back(job);
            if (!free) break;
        }
        return picked;
    }

    // The seconds that a job would take in full batches.
    double work(const Job& job) const { return seconds(job, costs("start"), costs("row"), costs("decode")); }

    // By how many seconds what is ahead of a newcomer exceeds MARGIN of the time up to its deadline, or that and its
    // own work exceed all of it.
    //
    // Ahead is what is due before it, and whatever has an earlier deadline. The newcomer's own work does not count for
    // MARGIN: otherwise there would never be room for long requests where short ones take all that becomes free.
    double lateness(const Job& job) const {
        if (!job.deadline) return 0.0;
        const double due = this->due(job), deadline = *job.deadline, never = std::numeric_limits<double>::infinity();
        const double start = costs("start"), row = costs("row"), decode = costs("decode");
        double ahead = 0.0;
        for (const auto& other : jobs)
            if (other->due <= due || other->deadline.value_or(never) <= deadline)
                ahead += seconds(*other, start, row, decode);
        ahead += undecoded * decode;
        const double time = deadline - job.arrived;
        return std::max({0.0, ahead - MARGIN * time, ahead + work(job) - time});
    }

    std::size_t places;
    Costs& costs;
    Jobs jobs;
    double undecoded = 0;  // weight of the samples that have left, and whose pictures are still to be decoded

  private:
    static double seconds(const Job& job, double start, double row, double decode) {
        return (job.started ? 0.0 : start) + job.weight * (job.left * row + job.samples * decode);
    }

    // When a job is due; with a deadline so early that no more passes it than can in PASSED of its time.
    double due(const Job& job) const {
        double stretched = STRETCH * work(job);
        if (job.deadline) stretched = std::min(stretched, PASSED * (*job.deadline - job.arrived));
        return job.arrived + stretched;
    }
};

}  // namespace dit_runtime
