// What a service draws: requests that wait for it, jobs, and the bundles that draw.
#include <algorithm>
#include <ctime>
#include <limits>

#include "errors.hpp"
#include "pictures.hpp"
#include "service.hpp"

namespace server {
namespace {

constexpr std::ptrdiff_t EDITING = 4;    // requests with pictures at a time: each may have as many bytes as a form
constexpr std::ptrdiff_t WAITING = 400;  // requests for images at a time; more connections than that are for others

// Why a request is refused, whatever it asks for, where each of the models has too much to do.
std::optional<Fault> refusal(const std::vector<Model*>& models, double deadline) {
    double late = std::numeric_limits<double>::infinity();
    for (const Model* const model : models) late = std::min(late, model->served->batcher->lateness(deadline));
    if (late <= 0) return std::nullopt;
    if (models.size() == 1) models[0]->served->batcher->count_refused();  // else nobody knows whose request it was
    return fault(std::make_exception_ptr(dit::Overloaded(late)));
}

}  // namespace

// Why a request for images is refused, whatever its body says; in overload most end here: it must cost little.
std::optional<Fault> Service::busy(const http::Request& request) {
    const auto under_way = [this](const std::vector<std::string>& paths) {
        return std::count_if(exchanges_.begin(), exchanges_.end(), [&](const auto& entry) {
            return entry.second.method == "POST" && dit::contains(paths, entry.second.path);
        });
    };
    const bool is_job = request.path == JOBS;
    std::optional<Fault> fault;
    std::string name;
    if (until_) {
        fault = {503, "the server is shutting down", "", {retry_after(1)}};
    } else {  // which of several models, only the body says: there is no room where none of them has any
        std::vector<Model*> all;
        for (const auto& each : models_) all.push_back(each.get());
        if (all.size() == 1) name = all[0]->name;
        fault = refusal(all, is_job ? settings_.job_deadline : settings_.deadline);
    }
    if (!fault && !is_job && under_way({GENERATIONS, EDITS}) >= WAITING)  // jobs are answered at once
        fault = {429, dit::text(WAITING, " requests wait for their images"), "", {retry_after(1)}};
    if (!fault && request.path == EDITS && under_way({EDITS}) >= EDITING)
        fault = {429, dit::text(EDITING, " requests with pictures are under way"), "", {retry_after(1)}};
    if (fault) metrics_.answer(name, fault->status, 0);
    return fault;
}

// The model that draws a body; throws Fault where it has too much to do.
Model& Service::model_with_room(const std::optional<std::string>& name, double deadline) {
    Model& model = this->model(name);
    if (models_.size() > 1)
        if (auto fault = refusal({&model}, deadline)) throw *fault;
    return model;
}

// Decodes an edit's pictures in the encoder's thread, then puts its images in line.
void Service::edit(const http::Request& request, std::uint64_t id) {
    const auto body =
        std::make_shared<Body>(parse_edit(request.header("content-type"), request.body, settings_.limits));
    const auto [height, width] = model_with_room(body->model, settings_.deadline).picture_size(*body);
    encoder_->add([this, id, body, height = height, width = width] {
        std::exception_ptr error;
        try {
            read_files(*body, height, width);
        } catch (...) {
            error = std::current_exception();
        }
        listener_->post([this, id, body, error] {
            const auto entry = exchanges_.find(id);
            if (entry == exchanges_.end()) return;  // its client has left
            try {
                if (error) std::rethrow_exception(error);
                entry->second.drawing = draw(std::move(*body), entry->second, false);
                entry->second.drawing->exchange = id;
            } catch (...) {
                answer(id, fault(std::current_exception()).response());
            }
        });
    });
}

// Puts the images in line, all of them or none.
std::shared_ptr<Drawing> Service::draw(Body fields, Exchange& exchange, bool is_job) {
    const auto drawing = std::make_shared<Drawing>();
    drawing->body = std::move(fields);
    const Body& body = drawing->body;
    const double deadline = is_job ? settings_.job_deadline : settings_.deadline;
    Model& model = model_with_room(body.model, deadline);
    exchange.model = drawing->model = model.name;
    exchange.fields.update(Json{{"model", model.name}, {"images", body.n}});
    if (is_job && body.response_format == "bytes") throw Fault{400, "a job's images are b64_json", "response_format"};
    drawing->served = model.served;
    drawing->created = std::time(nullptr);
    try {
        for (dit::Request& each : model.requests(body, settings_.limits)) {
            dit::Batcher::Submission submission;
            submission.deadline = deadline;
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
    Job& job = jobs_.get(drawing->job);
    const char* const status = response.status == 200 ? "succeeded" : response.status == 499 ? "cancelled" : "failed";
    Json fields = {{"job", job.id}, {"model", drawing->model}, {"status", status}};
    if (response.status == 200) fields.update(drawing->stats(0));
    jobs_.finish(job, status, Json::parse(response.body));
    log_line("info", "job ended", std::move(fields));
}

// Takes a job; throws Fault(429) where all that are here are under way.
http::Response Service::start_job(const http::Request& request, Exchange& exchange) {
    Body body = parse(request.body, settings_.limits);
    Job& job = jobs_.add();
    try {
        job.drawing = draw(std::move(body), exchange, true);
    } catch (...) {
        jobs_.forget(job.id);
        throw;
    }
    job.drawing->job = job.id;
    for (const auto& ticket : job.drawing->tickets) job.steps += ticket->evaluations();
    http::Response response = json(job.describe(), 202);
    response.headers.emplace_back("Location", JOBS + "/" + job.id);
    return response;
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
