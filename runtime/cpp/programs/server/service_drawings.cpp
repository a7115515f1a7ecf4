// What a service draws: requests that wait for it, jobs, and the bundles that draw.
#include <algorithm>
#include <ctime>

#include "errors.hpp"
#include "service.hpp"

namespace server {
namespace {

constexpr double KEPT = 600;            // seconds that a finished job's images stay
constexpr std::size_t MOST_JOBS = 256;  // finished ones included

}  // namespace

// Puts the images in line, all of them or none.
std::shared_ptr<Drawing> Service::draw(const http::Request& request, Exchange& exchange, bool is_job) {
    exchange.counted = true;
    if (until_) throw Fault{503, "the server is shutting down", "", {retry_after(1)}};
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
