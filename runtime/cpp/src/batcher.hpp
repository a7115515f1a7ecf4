// Step-level batching: requests that wait for the step stage share its next call. Mirrors dit_runtime/serve/batcher.py.
//
// Requests may differ in step, number of steps, solver, guidance, condition and seed. Each gets the bits that it gets
// alone, because a bundle's engines are batch invariant; where they are not, a call has one request. One thread owns
// the engines. Between two calls requests join, leave, fail or are cancelled.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "shared.hpp"
#include "ticket.hpp"

namespace dit_runtime {

// Draws requests of one open bundle; any thread may submit.
class Batcher {
  public:
    struct Settings {
        std::size_t places = 0;  // the most samples that share a call; 0: as many as the measured times say
        std::size_t memo_bytes = MEMO_BYTES;
        Clock clock = now;
    };

    struct Submission {
        std::optional<double> deadline = {};  // seconds from now
        Listener listener = {};
        std::function<void()> ended = {};  // called in the batcher's thread when the result is there; throws nothing
        bool latents = false;              // the result is the latents: nothing is decoded
    };

    // What has been done so far.
    struct Counts {
        std::size_t calls = 0, rows = 0, samples = 0, drawn = 0, refused = 0, late = 0, cancelled = 0, failed = 0;
        double step = 0, decode = 0;                 // seconds in calls of these stages
        std::size_t queued = 0, active = 0;          // requests that wait to be started, and that are under way
        std::size_t memo_hits = 0, memo_misses = 0;  // rows of the stages before the loop
    };

    using Tickets = std::vector<std::shared_ptr<Ticket>>;

    // Measures the step stage, and starts the thread. The pipeline outlives the batcher.
    Batcher(Pipeline& pipe, Settings settings);
    explicit Batcher(Pipeline& pipe) : Batcher(pipe, Settings()) {}
    ~Batcher() { close(false); }

    // Checks a request and puts it in line; throws UsageError, or Overloaded where its deadline is out of reach.
    std::shared_ptr<Ticket> submit(Request request, Submission submission);
    std::shared_ptr<Ticket> submit(Request request) { return submit(std::move(request), Submission()); }
    // By how many seconds what is ahead of any request with this deadline is too much; 0: there is room.
    double lateness(double deadline) const;
    void count_refused();  // a request that its host refused for that
    // Finishes what is in line, or without `drain` stops it; then the thread has ended.
    void close(bool drain = true);

    std::size_t places() const { return scheduler_.places; }
    bool alive() const { return alive_; }
    Counts counts() const;

    Pipeline& pipe;

  private:
    using Answer = std::pair<Prediction, std::exception_ptr>;  // one of both

    using Failures = std::vector<std::pair<std::shared_ptr<Ticket>, std::exception_ptr>>;

    void guarded_loop();
    void loop();
    Failures drop_out();
    void leave(const std::shared_ptr<Ticket>& ticket);
    void fail(const std::shared_ptr<Ticket>& ticket, std::exception_ptr error);
    void settle(Ticket& ticket, Drawn drawn, std::exception_ptr error);
    void start(const std::shared_ptr<Ticket>& ticket);
    void step(const Tickets& tickets);
    void charge(const std::string& what, double units);
    std::vector<Answer> evaluate(const Tickets& tickets);
    void tell(const std::shared_ptr<Ticket>& ticket, Prediction answer);
    void finish(const std::shared_ptr<Ticket>& ticket);
    void advance(Ticket& ticket, bool more);
    void decode();

    const Clock clock_;
    const std::size_t memo_bytes_;
    std::map<std::string, Sized> sizes_;
    SharedMemo memo_;
    Costs costs_;
    Scheduler<Ticket> scheduler_;
    std::deque<std::shared_ptr<Ticket>> undecoded_;
    Arrays stacked_;  // inputs of the last call, whose memory the next one takes
    Counts counts_;
    mutable std::mutex mutex_;
    std::condition_variable wake_;
    bool closing_ = false;
    double charged_ = 0;  // until when the thread's time is in the costs
    std::atomic<bool> alive_{true};
    std::mutex closer_;
    std::thread thread_;
};

}  // namespace dit_runtime
