#include "service.hpp"

#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <ctime>
#include <iostream>
#include <random>

#include "errors.hpp"
#include "pictures.hpp"

namespace server {
namespace {

constexpr double KEPT = 600;                                    // seconds that a finished job's images stay
constexpr std::size_t MOST_JOBS = 256;                          // finished ones included
const std::vector<std::string> OPEN = {"/healthz", "/readyz"};  // paths that need no key
const std::string GENERATIONS = "/v1/images/generations", JOBS = "/v1/jobs";

std::string random_id() {
    static const char* const letters = "0123456789abcdef";
    std::random_device device;
    std::string id;
    for (int part = 0; part < 4; ++part)
        for (unsigned int number = device(), digit = 0; digit < 8; ++digit) id += letters[number >> (4 * digit) & 15];
    return id;
}

bool is_id(const std::string& word) {
    return !word.empty() && word.size() <= 64 && std::all_of(word.begin(), word.end(), [](unsigned char letter) {
        return std::isalnum(letter) || letter == '_' || letter == '.' || letter == '-';
    });
}

double rounded(double value, double digits) { return std::round(value * digits) / digits; }

std::string dumped(const Json& table) { return table.dump(-1, ' ', false, Json::error_handler_t::replace); }

// Takes the same time wherever they differ.
bool equal(const std::string& first, const std::string& second) {
    unsigned char different = first.size() != second.size();
    for (std::size_t index = 0; index < std::min(first.size(), second.size()); ++index)
        different |= static_cast<unsigned char>(first[index] ^ second[index]);
    return !different;
}

std::string timing(const Json& stats) {
    std::vector<std::string> parts;
    for (const auto& [name, value] : stats.items())
        if (name.size() > 3 && name.substr(name.size() - 3) == "_ms")
            parts.push_back(name.substr(0, name.size() - 3) + ";dur=" + value.dump());
    return dit::join(parts);
}

http::Response json(const Json& table, int status = 200) { return {status, dumped(table)}; }

// The answer's JSON: OpenAI's fields, and each image's seed and cost; or the file of one image.
http::Response encode(const Drawing& drawing) {
    const dit::Shape shape = drawing.tickets[0]->manifest().image_shape();  // (3, H, W)
    const auto height = static_cast<std::size_t>(shape[1]), width = static_cast<std::size_t>(shape[2]);
    const auto file = [&](std::size_t image) {
        return png(drawing.tickets[image]->result().pictures.data(), height, width);
    };
    http::Response response;
    if (drawing.body.response_format == "bytes") {
        response.body = file(0);
        response.type = "image/png";
        response.headers = {{"X-Seed", std::to_string(drawing.seeds[0])}};
    } else {
        Json data = Json::array();
        for (std::size_t image = 0; image < drawing.tickets.size(); ++image)
            data.push_back(
                {{"b64_json", base64(file(image))}, {"seed", drawing.seeds[image]}, {"stats", drawing.stats(image)}});
        response = json({{"created", drawing.created},
                         {"model", drawing.model},
                         {"size", dit::text(width, "x", height)},
                         {"output_format", "png"},
                         {"data", data}});
    }
    response.headers.emplace_back("Server-Timing", timing(drawing.stats(0)));
    return response;
}

}  // namespace

Worker::~Worker() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true;
    }
    wake_.notify_one();
    thread_.join();
}

void Worker::add(std::function<void()> task) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
}

void Worker::work() {
    for (;;) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return ending_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        const std::function<void()> task = std::move(tasks_.front());
        tasks_.pop_front();
        lock.unlock();
        task();
    }
}

Json Drawing::stats(std::size_t image) const {
    const dit::Stats& stats = tickets[image]->stats();
    const auto ms = [](double seconds) { return rounded(1e3 * seconds, 100); };
    return {{"queue_ms", ms(stats.queue)},         {"conditions_ms", ms(stats.conditions)},
            {"steps_ms", ms(stats.steps)},         {"decode_ms", ms(stats.decode)},
            {"total_ms", ms(stats.total)},         {"calls", stats.calls},
            {"batch", rounded(stats.batch(), 100)}};
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

void log_line(const char* level, const std::string& event, Json fields) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const std::time_t seconds = std::chrono::duration_cast<std::chrono::seconds>(now).count();
    char when[80];
    std::tm parts = {};
    gmtime_r(&seconds, &parts);
    const std::size_t size = std::strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%S", &parts);
    const auto ms = static_cast<int>(std::chrono::duration_cast<std::chrono::milliseconds>(now).count() % 1000);
    std::snprintf(when + size, sizeof when - size, ".%03dZ", ms);
    fields.update(Json{{"time", when}, {"level", level}, {"event", event}});
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    std::cerr << dumped(fields) + "\n" << std::flush;
}

Fault fault(std::exception_ptr error) {
    try {
        std::rethrow_exception(std::move(error));
    } catch (const Fault& known) {
        return known;
    } catch (const dit::Overloaded& busy) {
        return {429, busy.what(), "", {retry_after(busy.retry_after)}};
    } catch (const dit::Closed&) {
        return {503, "the server is being replaced; try again", "", {retry_after(1)}};
    } catch (const dit::UsageError& usage) {
        return {400, usage.what()};
    } catch (const dit::Late& late) {
        return {504, late.what()};
    } catch (const dit::Stopped&) {
        return {499, "the request was cancelled"};
    } catch (const std::exception& other) {
        log_line("error", "failed", {{"reason", other.what()}});
        const bool engine = dynamic_cast<const dit::EngineError*>(&other);
        return {500, dit::text(engine ? "an engine failed" : "internal error",
                               "; the server's log says more under this request's id")};
    }
}

void Service::run(http::Listener& listener) {
    listener_ = &listener;
    encoder_ = std::make_unique<Worker>(), swapper_ = std::make_unique<Worker>(), closer_ = std::make_unique<Worker>();
    for (const int number : {SIGTERM, SIGINT, SIGHUP}) listener.pass_on(number);
    listener.run();
    swapper_.reset();
    for (const auto& model : models_) model->served->batcher->close(false);
    for (const auto& served : old_) served->batcher->close(false);
    closer_.reset(), encoder_.reset();
}

void Service::signalled(int number) {
    if (number == SIGHUP) return swap();
    if (until_ && number == SIGINT) until_ = 0;  // the second one stops at once
    if (!until_) until_ = dit::now() + settings_.grace;
    listener_->stop();
}

bool Service::goes_on(bool has_connections) {
    return dit::now() < until_.value_or(0) && (has_connections || !drawings_.empty());
}

Service::Exchange Service::open(const http::Request& request) {
    Exchange exchange;
    const std::string own = request.header("x-request-id");
    exchange.id = is_id(own) ? own : random_id();
    exchange.began = dit::now();
    exchange.method = request.method;
    exchange.path = request.path.substr(0, 200);
    return exchange;
}

std::optional<http::Response> Service::refuse(const http::Head& head, std::uint64_t id) {
    const http::Request& request = head.request;
    std::optional<Fault> fault;
    std::string host = request.header("host");
    const std::size_t colon = host.rfind(':');
    if (colon != std::string::npos && host.find_first_not_of("0123456789", colon + 1) == std::string::npos)
        host.resize(colon);
    if (head.refusal)
        fault = {head.refusal, head.refusal == 431 ? "the request's head is too large" : "this is no HTTP request"};
    else if (settings_.key.empty() && !dit::contains(settings_.hosts, host))
        fault = {403, "this server has no API key, so it answers only to its own host name"};
    else if (!settings_.key.empty() && !dit::contains(OPEN, request.path) &&
             !equal(request.header("authorization"), "Bearer " + settings_.key))
        fault = {401, "no API key, or a wrong one", "", {{"WWW-Authenticate", "Bearer"}}};
    else if (request.headers.count("transfer-encoding") || (request.method == "POST" && !head.has_length))
        fault = {411, "a body needs its length, Content-Length"};
    else if (head.length > settings_.body)
        fault = {413, dit::text("the body has more than ", settings_.body, " bytes")};
    else if (request.method == "POST") {
        const std::string type = request.header("content-type");
        if (dit::lower(dit::strip(type.substr(0, type.find(';')))) != "application/json")
            fault = {415, "the body must have the type application/json"};
    }
    Exchange& exchange = exchanges_[id] = open(request);
    if (!fault) return std::nullopt;
    http::Response response = fault->response();
    response.headers.emplace_back("X-Request-Id", exchange.id);
    log(exchange, response.status);
    exchanges_.erase(id);
    return response;
}

void Service::ask(http::Request request, std::uint64_t id) {
    try {
        if (auto response = route(request, id)) answer(id, std::move(*response));
    } catch (...) {
        answer(id, fault(std::current_exception()).response());
    }
}

void Service::leave(std::uint64_t id) {
    const auto entry = exchanges_.find(id);
    if (entry == exchanges_.end()) return;
    Exchange& exchange = entry->second;
    if (exchange.drawing) {
        exchange.drawing->over = true;
        exchange.drawing->cancel();
    }
    if (exchange.counted) metrics_.answer(exchange.model, 499, dit::now() - exchange.began);
    log(exchange, 499);
    exchanges_.erase(entry);
}

void Service::answer(std::uint64_t id, http::Response response) {
    const auto entry = exchanges_.find(id);
    if (entry == exchanges_.end()) return;
    Exchange exchange = std::move(entry->second);
    exchanges_.erase(entry);
    response.headers.emplace_back("X-Request-Id", exchange.id);
    if (exchange.counted) metrics_.answer(exchange.model, response.status, dit::now() - exchange.began);
    log(exchange, response.status);
    listener_->answer(id, response);
}

void Service::log(Exchange& exchange, int status) {
    if (dit::contains({"/healthz", "/readyz", "/metrics"}, exchange.path)) return;
    Json fields = exchange.fields;
    fields.update(Json{{"id", exchange.id},
                       {"method", exchange.method},
                       {"path", exchange.path},
                       {"status", status},
                       {"ms", rounded(1e3 * (dit::now() - exchange.began), 10)}});
    log_line("info", "request", std::move(fields));
}

std::optional<http::Response> Service::route(const http::Request& request, std::uint64_t id) {
    Exchange& exchange = exchanges_.at(id);
    const std::string method = request.method == "HEAD" ? "GET" : request.method, path = request.path;
    const auto only = [&](std::vector<std::string> methods) {
        if (!dit::contains(methods, method))
            throw Fault{405, "Method Not Allowed", "", {{"Allow", dit::join(methods)}}};
    };
    const auto behind = [&](const std::string& prefix) {
        return path.rfind(prefix, 0) == 0 ? path.substr(prefix.size()) : std::string();
    };
    if (path == GENERATIONS) {
        only({"POST"});
        exchange.drawing = draw(request, exchange, false);
        exchange.drawing->exchange = id;
        return std::nullopt;
    }
    if (path == JOBS) {
        only({"POST"});
        return start_job(request, exchange);
    }
    if (const std::string name = behind(JOBS + "/"); !name.empty()) {
        only({"GET", "DELETE"});
        Job& job = find_job(name);
        if (method == "GET") return json(job.describe());
        if (job.drawing)
            job.drawing->cancel();
        else
            jobs_.erase(name);
        return json({{"id", name}, {"object", "image.job"}, {"deleted", true}});
    }
    if (path == "/v1/images/edits") throw Fault{501, "dit-server edits no images"};
    if (path == "/v1/models") {
        only({"GET"});
        Json data = Json::array();
        for (const auto& each : models_) data.push_back(each->describe());
        return json({{"object", "list"}, {"data", data}});
    }
    if (const std::string name = behind("/v1/models/"); !name.empty()) {
        only({"GET"});
        return json(model(name).describe());
    }
    if (path == "/healthz") return only({"GET"}), json({{"status", "ok"}});
    if (path == "/readyz") return only({"GET"}), ready();
    if (path == "/metrics")
        return only({"GET"}), http::Response{200, metrics_.scrape(models_), "text/plain; version=0.0.4; charset=utf-8"};
    throw Fault{404, "Not Found"};
}

// 200 where every model draws; of each whether it does, and why its last swap was refused.
http::Response Service::ready() const {
    Json table = Json::object();
    bool sound = !until_;
    for (const auto& each : models_) {
        const bool alive = each->served->batcher->alive();
        sound = sound && alive;
        table[each->name] = {{"alive", alive}, {"refused", each->refusal}};
    }
    return json({{"ready", sound}, {"models", table}}, sound ? 200 : 503);
}

Model& Service::model(const std::optional<std::string>& name) {
    std::vector<std::string> names;
    for (const auto& each : models_) {
        if (!name || each->name == *name) return *each;
        names.push_back(each->name);
    }
    throw Fault{404, "this server has no such model; it has " + dit::join(names), "model"};
}

// Puts the images in line, all of them or none.
std::shared_ptr<Drawing> Service::draw(const http::Request& request, Exchange& exchange, bool is_job) {
    exchange.counted = true;
    if (until_) throw Fault{503, "the server is shutting down", "", {retry_after(1), {"Connection", "close"}}};
    const auto drawing = std::make_shared<Drawing>();
    drawing->body = parse(request.body, settings_.limits);
    const Body& body = drawing->body;
    Model& model = this->model(body.model);
    exchange.model = drawing->model = model.name;
    exchange.fields.update(Json{{"model", model.name}, {"images", body.n}});
    if (is_job && body.response_format == "bytes") throw Fault{400, "a job's images are b64_json", "response_format"};
    drawing->served = model.served;
    drawing->created = std::time(nullptr);
    try {
        for (dit::Request& each : model.requests(body, settings_.limits)) {
            dit::Batcher::Submission submission;
            submission.deadline = is_job ? settings_.job_deadline : settings_.deadline;
            submission.ended = [this, drawing, image = drawing->tickets.size()] {
                listener_->post([this, drawing, image] { end(drawing, image); });
            };
            drawing->seeds.push_back(each.seeds[0]);
            drawing->tickets.push_back(model.served->batcher->submit(std::move(each), std::move(submission)));
        }
    } catch (...) {
        drawing->over = true;
        drawing->cancel();
        throw;
    }
    drawings_.insert(drawing);
    return drawing;
}

// An image has ended: with the last one the request has, and with the first that failed.
void Service::end(const std::shared_ptr<Drawing>& drawing, std::size_t image) {
    ++drawing->ended;
    const bool all = drawing->ended == drawing->tickets.size();
    if (drawing->over && all) drawings_.erase(drawing);
    if (drawing->over) return;
    try {
        drawing->tickets[image]->result();
    } catch (...) {
        drawing->cancel();
        finish(drawing, fault(std::current_exception()).response());
        return;
    }
    if (!all) return;
    encoder_->add([this, drawing] {
        http::Response response;
        try {
            response = encode(*drawing);
        } catch (...) {
            response = fault(std::current_exception()).response();
        }
        listener_->post([this, drawing, response] {
            if (!drawing->over) finish(drawing, response);
            drawings_.erase(drawing);
        });
    });
}

void Service::finish(const std::shared_ptr<Drawing>& drawing, http::Response response) {
    drawing->over = true;
    if (drawing->ended == drawing->tickets.size()) drawings_.erase(drawing);
    if (response.status == 200)
        for (const auto& ticket : drawing->tickets) metrics_.image(drawing->model, ticket->stats());
    if (drawing->exchange) {
        const auto exchange = exchanges_.find(drawing->exchange);
        if (exchange != exchanges_.end() && response.status == 200) exchange->second.fields.update(drawing->stats(0));
        return answer(drawing->exchange, std::move(response));
    }
    const auto entry = jobs_.find(drawing->job);
    if (entry == jobs_.end()) return;
    Job& job = entry->second;
    for (const auto& ticket : drawing->tickets) job.steps_done += ticket->done();
    job.status = response.status == 200 ? "succeeded" : response.status == 499 ? "cancelled" : "failed";
    job.result = Json::parse(response.body);
    job.drawing.reset();
    job.ended = dit::now();
    Json fields = {{"job", job.id}, {"model", drawing->model}, {"status", job.status}};
    if (response.status == 200) fields.update(drawing->stats(0));
    log_line("info", "job ended", std::move(fields));
}

// Makes room, and takes a job; throws Fault(429) where all that are here are under way.
http::Response Service::start_job(const http::Request& request, Exchange& exchange) {
    const double now = dit::now();
    auto oldest = jobs_.end();
    for (auto job = jobs_.begin(); job != jobs_.end();) {
        const bool ended = !job->second.drawing;
        if (ended && now - job->second.ended > KEPT) {
            job = jobs_.erase(job);
            continue;
        }
        if (ended && (oldest == jobs_.end() || job->second.number < oldest->second.number)) oldest = job;
        ++job;
    }
    if (jobs_.size() >= MOST_JOBS && oldest == jobs_.end())
        throw Fault{429, dit::text(MOST_JOBS, " jobs are under way"), "", {retry_after(5)}};
    const std::shared_ptr<Drawing> drawing = draw(request, exchange, true);
    if (jobs_.size() >= MOST_JOBS) jobs_.erase(oldest);
    Job job;
    job.id = drawing->job = random_id();
    job.created = drawing->created;
    job.number = ++jobs_made_;
    job.drawing = drawing;
    for (const auto& ticket : drawing->tickets) job.steps += ticket->evaluations();
    http::Response response = json(job.describe(), 202);
    response.headers.emplace_back("Location", JOBS + "/" + job.id);
    jobs_.emplace(job.id, std::move(job));
    return response;
}

Job& Service::find_job(const std::string& id) {
    const auto job = jobs_.find(id);
    if (job == jobs_.end() || (!job->second.drawing && dit::now() - job->second.ended > KEPT))
        throw Fault{404, "no job has this id; finished jobs are forgotten after a while"};
    return job->second;
}

// Serves what the bundles' folders hold now: each is opened and verified beside the old one, which goes on drawing and
// then finishes what it has. A model whose new bundle is refused keeps the old one.
void Service::swap() {
    if (swapping_) {
        swap_again_ = true;
        return;
    }
    swapping_ = true;
    for (const auto& each : models_) {
        swapper_->add([this, model = each.get(), current = each->served] {
            try {
                const std::shared_ptr<Served> fresh = model->look(*current);
                if (!fresh) return;
                listener_->post([this, model, fresh] {
                    const std::shared_ptr<Served> old = std::exchange(model->served, fresh);
                    model->refusal.clear();
                    ++model->swapped;
                    old_.push_back(old);
                    closer_->add([this, old] {
                        old->batcher->close();
                        listener_->post([this, old] { old_.erase(std::find(old_.begin(), old_.end(), old)); });
                    });
                    log_line("info", "swapped", {{"model", model->name}, {"sha256", fresh->sha256}});
                });
            } catch (const std::exception& error) {
                listener_->post([model, reason = std::string(error.what())] {
                    model->refusal = reason;
                    ++model->refused;
                    log_line("error", "swap refused", {{"model", model->name}, {"reason", reason}});
                });
            }
        });
    }
    swapper_->add([this] {
        listener_->post([this] {
            swapping_ = false;
            if (std::exchange(swap_again_, false)) swap();
        });
    });
}

}  // namespace server
