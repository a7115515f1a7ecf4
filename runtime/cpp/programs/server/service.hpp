// The HTTP API: images and jobs as OpenAI's clients know them, health and metrics.
// Mirrors dit_serve/app.py and guard.py; all of it runs in the listener's thread.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>

#include "jobs.hpp"
#include "listener.hpp"
#include "metrics.hpp"

namespace server {

inline const std::string GENERATIONS = "/v1/images/generations", JOBS = "/v1/jobs", EDITS = "/v1/images/edits";

struct Settings {
    double deadline = 60, job_deadline = 600;  // seconds from a request to its images, and of a job
    double grace = 30;                         // seconds that work under way gets after SIGTERM
    Limits limits;
    std::string key;                 // clients send it as "Authorization: Bearer KEY"; empty: none
    std::vector<std::string> hosts;  // what clients may call this server where there is no key
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
    std::optional<Fault> busy(const http::Request& request);
    Model& model(const std::optional<std::string>& name);
    Model& model_with_room(const std::optional<std::string>& name, double deadline);
    std::shared_ptr<Drawing> draw(Body body, Exchange& exchange, bool is_job);
    void edit(const http::Request& request, std::uint64_t id);
    void end(const std::shared_ptr<Drawing>& drawing, std::size_t image);
    void finish(const std::shared_ptr<Drawing>& drawing, http::Response response);
    http::Response start_job(const http::Request& request, Exchange& exchange);
    void swap();

    Models models_;
    const Settings settings_;
    Metrics metrics_;
    http::Listener* listener_ = nullptr;
    std::map<std::uint64_t, Exchange> exchanges_;  // by connection
    Jobs jobs_;
    std::set<std::shared_ptr<Drawing>> drawings_;  // under way
    std::vector<std::shared_ptr<Served>> old_;     // bundles that finish what they have
    bool swapping_ = false, swap_again_ = false;
    std::optional<double> until_;  // by the clock, when work under way is stopped; none: it is not shutting down
    std::unique_ptr<Worker> encoder_, swapper_, closer_;
};

}  // namespace server
