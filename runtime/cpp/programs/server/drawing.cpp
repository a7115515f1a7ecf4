#include "drawing.hpp"

#include <atomic>
#include <chrono>
#include <cmath>
#include <ctime>
#include <iostream>
#include <random>

#include "errors.hpp"
#include "pictures.hpp"

namespace server {
namespace {

std::atomic<bool> is_quiet{false};

std::string dumped(const Json& table) { return table.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::string timing(const Json& stats) {
    std::vector<std::string> parts;
    for (const auto& [name, value] : stats.items())
        if (name.size() > 3 && name.substr(name.size() - 3) == "_ms")
            parts.push_back(name.substr(0, name.size() - 3) + ";dur=" + value.dump());
    return dit::join(parts);
}

}  // namespace

double rounded(double value, double digits) { return std::round(value * digits) / digits; }

std::string random_id() {
    static const char* const letters = "0123456789abcdef";
    std::random_device device;
    std::string id;
    for (int part = 0; part < 4; ++part)
        for (unsigned int number = device(), digit = 0; digit < 8; ++digit) id += letters[number >> (4 * digit) & 15];
    return id;
}

http::Response json(const Json& table, int status) { return {status, dumped(table)}; }

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

void quiet_log() { is_quiet = true; }

void log_line(const char* level, const std::string& event, Json fields) {
    if (is_quiet && std::string(level) == "info") return;
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
        return {400, dit::one_line(usage.what())};
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

}  // namespace server
