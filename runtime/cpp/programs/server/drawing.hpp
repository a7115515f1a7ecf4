// A request for images under way. Mirrors dit_serve/drawing.py.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "models.hpp"

namespace server {

using Json = nlohmann::json;

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

// A ticket for each image.
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

// The answer to a request whose images are drawn: JSON with OpenAI's fields, each image's seed and cost; or one file.
http::Response encode(const Drawing& drawing);

// The error that a client gets to read; what an engine says stays in the log.
Fault fault(std::exception_ptr error);

// From now on leaves out lines of the level "info".
void quiet_log();

// A line of JSON on standard error.
void log_line(const char* level, const std::string& event, Json fields = Json::object());

http::Response json(const Json& table, int status = 200);

std::string random_id();

double rounded(double value, double digits);

}  // namespace server
