// The HTTP API: images and jobs as OpenAI's clients know them, health and metrics.
// Mirrors dit_serve/app.py, guard.py, drawing.py and jobs.py; everything but Worker runs in the listener's thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <thread>

#include "listener.hpp"
#include "metrics.hpp"

namespace server {

using Json = nlohmann::json;

struct Settings {
    double deadline = 60, job_deadline = 600;  // seconds from a request to its images, and of a job
    double grace = 30;                         // seconds that work under way gets after SIGTERM
    Limits limits;
    std::size_t body = 64 << 10;     // bytes
    std::string key;                 // clients send it as "Authorization: Bearer KEY"; empty: none
    std::vector<std::string> hosts;  // what clients may call this server where there is no key
};

// A thread that does one thing after the other.
class Worker {
  public:
    Worker() : thread_([this] { work(); }) {}
    ~Worker();
    void add(std::function<void()> task);

  private:
    void work();

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<std::function<void()>> tasks_;
    bool ending_ = false;
    std::thread thread_;
};

// A ticket for each image; and a job, where nobody waits for them.
struct Drawing {
    std::string model;
    std::shared_ptr<Served> served;
    Body body;
    std::vector<std::uint64_t> seeds;
    dit::Batcher::Tickets tickets;
    std::size_t ended = 0;
    std::int64_t created = 0;
    bool over = false;           // answered, or left by its client
    std::uint64_t exchange = 0;  // the connection that waits; 0: a job
    std::string job;

    void cancel() {
        for (const auto& ticket : tickets) ticket->cancel();
    }
    Json stats(std::size_t image) const;
};

struct Job {
    std::string id, status = "queued";  // then running; succeeded, failed or cancelled at the end
    std::int64_t created = 0;
    double ended = 0;                  // by the clock; 0: it is under way
    Json result = Json::object();      // or the error
    std::shared_ptr<Drawing> drawing;  // while it is under way
    int steps_done = 0, steps = 0;
    std::uint64_t number = 0;  // of its arrival

    Json describe() const;
};

class Service : public http::Host {
  public:
    Service(Models models, Settings settings) : models_(std::move(models)), settings_(std::move(settings)) {}

    // Serves until SIGTERM or SIGINT; then what is under way is finished.
    void run(http::Listener& listener);

    std::optional<http::Response> refuse(const http::Head& head, std::uint64_t id) override;
    void ask(http::Request request, std::uint64_t id) override;
    void leave(std::uint64_t id) override;
    void signalled(int number) override;
    bool goes_on(bool has_connections) override;

  private:
    // A request of a client, until its answer.
    struct Exchange {
        std::string id;  // in the log and in X-Request-Id
        double began = 0;
        Json fields = Json::object();  // of the log
        std::string method, path, model;
        bool counted = false;  // in the metrics of requests
        std::shared_ptr<Drawing> drawing;
    };

    Exchange open(const http::Request& request);
    // None where the answer comes later; throws Fault.
    std::optional<http::Response> route(const http::Request& request, std::uint64_t id);
    http::Response ready() const;
    void answer(std::uint64_t id, http::Response response);
    void log(Exchange& exchange, int status);
    Model& model(const std::optional<std::string>& name);
    std::shared_ptr<Drawing> draw(const http::Request& request, Exchange& exchange, bool is_job);
    void end(const std::shared_ptr<Drawing>& drawing, std::size_t image);
    void finish(const std::shared_ptr<Drawing>& drawing, http::Response response);
    http::Response start_job(const http::Request& request, Exchange& exchange);
    Job& find_job(const std::string& id);
    void swap();

    Models models_;
    const Settings settings_;
    Metrics metrics_;
    http::Listener* listener_ = nullptr;
    std::map<std::uint64_t, Exchange> exchanges_;  // by connection
    std::map<std::string, Job> jobs_;
    std::uint64_t jobs_made_ = 0;
    std::set<std::shared_ptr<Drawing>> drawings_;  // under way
    std::vector<std::shared_ptr<Served>> old_;     // bundles that finish what they have
    bool swapping_ = false, swap_again_ = false;
    std::optional<double> until_;  // by the clock, when work under way is stopped; none: it is not shutting down
    std::unique_ptr<Worker> encoder_, swapper_, closer_;
};

// The error that a client gets to read; what an engine says stays in the log.
Fault fault(std::exception_ptr error);

// A line of JSON on standard error.
void log_line(const char* level, const std::string& event, Json fields = Json::object());

}  // namespace server
