#include "service.hpp"

#include <signal.h>

#include <algorithm>

#include "errors.hpp"

namespace server {
namespace {

const std::vector<std::string> OPEN = {"/healthz", "/readyz"};  // paths that need no key

bool is_id(const std::string& word) {
    return !word.empty() && word.size() <= 64 && std::all_of(word.begin(), word.end(), [](unsigned char letter) {
        return std::isalnum(letter) || letter == '_' || letter == '.' || letter == '-';
    });
}

// A host's name without what is before its last slash, and without its port.
std::string host_of(std::string name) {
    name.erase(0, name.rfind('/') + 1);  // npos + 1 is 0
    const std::size_t colon = name.rfind(':');
    const bool has_port =
        colon != std::string::npos && name.find_first_not_of("0123456789", colon + 1) == std::string::npos;
    return has_port ? name.substr(0, colon) : name;
}

// Takes the same time wherever they differ.
bool equal(const std::string& first, const std::string& second) {
    unsigned char different = first.size() != second.size();
    for (std::size_t index = 0; index < std::min(first.size(), second.size()); ++index)
        different |= static_cast<unsigned char>(first[index] ^ second[index]);
    return !different;
}

}  // namespace

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
    const bool is_edit = request.method == "POST" && request.path == EDITS;
    const std::size_t most = is_edit ? settings_.limits.form : settings_.limits.body;
    std::optional<Fault> fault;
    if (head.refusal)
        fault = {head.refusal, head.refusal == 431 ? "the request's head is too large" : "this is no HTTP request"};
    else if (settings_.key.empty() && !dit::contains(settings_.hosts, host_of(request.header("host"))))
        fault = {403, "this server has no API key, so it answers only to its own host name"};
    else if (!settings_.key.empty() && !dit::contains(OPEN, request.path) &&
             !equal(request.header("authorization"), "Bearer " + settings_.key))
        fault = {401, "no API key, or a wrong one", "", {{"WWW-Authenticate", "Bearer"}}};
    else if (settings_.key.empty() && request.method == "POST" && request.headers.count("origin") &&
             !dit::contains(settings_.hosts, host_of(request.header("origin"))))
        fault = {403, "this server has no API key, so it takes nothing from pages of other origins"};
    else if (request.headers.count("transfer-encoding") || (request.method == "POST" && !head.has_length))
        fault = {411, "a body needs its length, Content-Length"};
    else if (head.length > most)
        fault = {413, dit::text("the body has more than ", most, " bytes")};
    else if (request.method == "POST") {
        const std::string type = request.header("content-type");
        const std::string expected = is_edit ? "multipart/form-data" : "application/json";
        if (dit::lower(dit::strip(type.substr(0, type.find(';')))) != expected)
            fault = {415, "the body must have the type " + expected};
    }
    const bool draws = request.method == "POST" && dit::contains({GENERATIONS, EDITS, JOBS}, request.path);
    if (!fault && draws) fault = busy(request);
    Exchange& exchange = exchanges_[id] = open(request);
    exchange.counted = draws;
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
        exchange.drawing = draw(parse(request.body, settings_.limits), exchange, false);
        exchange.drawing->exchange = id;
        return std::nullopt;
    }
    if (path == JOBS) {
        only({"POST"});
        return start_job(request, exchange);
    }
    if (const std::string name = behind(JOBS + "/"); !name.empty()) {
        only({"GET", "DELETE"});
        Job& job = jobs_.get(name);
        if (method == "GET") return json(job.describe());
        if (job.drawing)
            job.drawing->cancel();
        else
            jobs_.forget(name);
        return json({{"id", name}, {"object", "image.job"}, {"deleted", true}});
    }
    if (path == EDITS) {
        only({"POST"});
        edit(request, id);
        return std::nullopt;
    }
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

}  // namespace server
