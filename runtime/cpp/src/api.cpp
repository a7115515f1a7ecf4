// The C ABI's models and runs: checks what comes in. What describes a bundle is in api_info.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "errors.hpp"
#include "handle.hpp"
#include "log.hpp"
#include "structs.hpp"
#include "translate.hpp"
#include "verify.hpp"

namespace dit_runtime {
namespace {

// Refuses a buffer in which `count` samples of the row's size do not fit, before any work is done.
void require_room(std::size_t size, std::size_t count, const Shape& row, const char* unit) {
    const std::size_t numbers = dit_runtime::count(row);
    if (count > SIZE_MAX / numbers) throw UsageError(text("count is ", count, "; no memory holds that many"));
    if (size < count * numbers)
        throw TooSmall(text("the buffer holds ", size, " ", unit, "; expected ", count * numbers, ", ", numbers,
                            " for each of ", count));
}

// The bundle at the request's size.
Pipeline& sized(const dit_model* model, const dit_request* request) {
    require(model, "model");
    const char* const size = known(request, dit_request DIT_REQUEST_INIT, "dit_request").size;
    return model->pipe->at(size ? size : "");
}

// A call that the caller may watch and stop.
Call call_of(const dit_cancellation* cancellation, bool of_bytes, dit_on_progress on_progress, void* user) {
    Call call;
    if (cancellation) call.cancellation = cancellation->shared;
    if (!on_progress) return call;
    if (!cancellation) call.cancellation = std::make_shared<Cancellation>();
    call.progress = std::make_shared<Progress>(of_bytes, [=, own = call.cancellation](double done) {
        if (on_progress(done, user)) own->cancel();
    });
    return call;
}

// From the caller's struct to what a pipeline is opened with.
struct Opening {
    Call call;
    Options options;
    std::vector<std::int64_t> warm;
    std::string size;
};

Opening opening(const dit_open_options* arguments) {
    Opening to;
    if (!arguments) return to;
    const dit_open_options from = known(arguments, dit_open_options DIT_OPEN_OPTIONS_INIT, "dit_open_options");
    if (from.backend) to.options.backend = from.backend;
    if (from.device) to.options.device = from.device;
    to.options.threads = from.threads;
    to.options.low_memory = from.low_memory != 0;
    if (from.num_warm) require(from.warm, "warm");
    if (from.warm) to.warm.assign(from.warm, from.warm + from.num_warm);
    if (from.size) to.size = from.size;
    if (from.manifest_sha256) to.options.manifest_sha256 = from.manifest_sha256;
    if (from.public_key_size) require(from.public_key, "public_key");
    if (from.public_key) to.options.public_key.emplace(from.public_key, from.public_key + from.public_key_size);
    if (from.num_settings) require(from.settings, "settings");
    for (std::size_t index = 0; index < from.num_settings; ++index) {
        const dit_setting& setting = from.settings[index];
        require(setting.key, "dit_setting.key");
        require(setting.value, "dit_setting.value");
        to.options.settings.push_back({setting.stage ? setting.stage : "", setting.key, setting.value});
    }
    to.options.max_bytes = from.max_bytes;
    to.call = call_of(from.cancellation, true, from.on_progress, from.user);
    return to;
}

}  // namespace
}  // namespace dit_runtime

namespace dit = dit_runtime;

extern "C" {

dit_status dit_model_open(const char* bundle, const dit_open_options* options, dit_model** model) {
    if (model) *model = nullptr;
    return dit::attempt([&] {
        dit::require(model, "model");
        dit::require(bundle, "bundle");
        const dit::Opening from = dit::opening(options);
        const dit::CallScope scope(from.call);
        *model = new dit_model(std::make_unique<dit::Pipeline>(bundle, from.options, from.warm, from.size));
    });
}

dit_cancellation* dit_cancellation_new(void) {
    try {
        return new dit_cancellation;
    } catch (...) {
        return nullptr;
    }
}

void dit_cancel(dit_cancellation* cancellation) {
    if (cancellation) cancellation->shared->cancel();
}

void dit_cancellation_free(dit_cancellation* cancellation) { delete cancellation; }

dit_model* dit_model_retain(dit_model* model) {
    if (model) model->references.fetch_add(1, std::memory_order_relaxed);
    return model;
}

void dit_model_release(dit_model* model) {
    if (model && model->references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete model;
}

dit_status dit_model_generate(dit_model* model, const dit_request* request, uint8_t* pixels, size_t size) {
    return dit::attempt([&] {
        dit::Pipeline& open = dit::sized(model, request);
        dit::require(pixels, "pixels");
        open.require_decoder();
        dit::require_room(size, dit::counted(request).count, open.manifest.image_shape(), "bytes");
        const std::vector<std::uint8_t> made = open.images(dit::translate(open.manifest, request));
        std::copy(made.begin(), made.end(), pixels);
    });
}

dit_status dit_model_generate_latents(dit_model* model, const dit_request* request, float* latents, size_t size) {
    return dit::attempt([&] {
        dit::Pipeline& open = dit::sized(model, request);
        dit::require(latents, "latents");
        dit::require_room(size, dit::counted(request).count, open.manifest.state().shape, "numbers");
        const std::vector<float> made = open.latents(dit::translate(open.manifest, request));
        std::copy(made.begin(), made.end(), latents);
    });
}

dit_status dit_model_warm(dit_model* model, const int64_t* batches, size_t num_batches, const char* size,
                          dit_cancellation* cancellation) {
    return dit::attempt([&] {
        dit::require(model, "model");
        if (num_batches) dit::require(batches, "batches");
        const dit::CallScope scope(dit::call_of(cancellation, false, nullptr, nullptr));
        model->pipe->at(size ? size : "").warm({batches, batches + num_batches});
    });
}

dit_status dit_model_verify(dit_model* model, const dit_verify_options* options) {
    return dit::attempt([&] {
        dit::require(model, "model");
        const dit_verify_options defaults = DIT_VERIFY_OPTIONS_INIT;
        const dit_verify_options from = options ? dit::known(options, defaults, "dit_verify_options") : defaults;
        const dit::CallScope scope(dit::call_of(from.cancellation, false, from.on_progress, from.user));
        std::string failure;
        dit::verify(*model->pipe, [&](const dit::Figure& figure) {
            if (!figure.passed() && failure.empty())
                failure =
                    dit::text(figure.name(), " is ", figure.value, " ", figure.where, ", expected ",
                              std::isinf(figure.limit) ? dit::text("a number")
                                                       : dit::text(figure.at_least ? ">= " : "<= ", figure.limit));
            if (from.on_check)
                from.on_check(dit::one_line(figure.name()).c_str(), figure.value, figure.limit, figure.at_least,
                              figure.passed(), dit::one_line(figure.where).c_str(), from.user);
        });
        if (!failure.empty()) throw dit::NotVerified(failure);
    });
}

dit_status dit_run_begin(dit_model* model, const dit_request* request, dit_run** run) {
    if (run) *run = nullptr;
    return dit::attempt([&] {
        dit::Pipeline& open = dit::sized(model, request);
        dit::require(run, "run");
        dit::require_room(SIZE_MAX, dit::counted(request).count, open.manifest.state().shape, "numbers");
        *run = new dit_run(model, dit::translate(open.manifest, request));
    });
}

dit_status dit_run_step(dit_run* run, int* more) {
    return dit::guarded(run, [&] {
        dit::require(more, "more");
        *more = run->run.step();
    });
}

dit_status dit_run_latents(dit_run* run, float* latents, size_t size) {
    return dit::guarded(run, [&] {
        dit::require(latents, "latents");
        dit::require_room(size, run->run.count(), run->run.pipe().manifest.state().shape, "numbers");
        const dit::Array& state = run->run.state();
        std::transform(state.begin(), state.end(), latents, [](double value) { return static_cast<float>(value); });
    });
}

dit_status dit_run_rows(dit_run* run, int64_t* rows, int64_t* planned) {
    return dit::guarded(run, [&] {
        dit::require(rows, "rows");
        dit::require(planned, "planned");
        const auto whole = run->run.planned_rows();
        *rows = static_cast<int64_t>(run->run.rows());
        *planned = whole ? static_cast<int64_t>(*whole) : -1;
    });
}

dit_status dit_run_result(dit_run* run, uint8_t* pixels, size_t size) {
    return dit::guarded(run, [&] {
        dit::Pipeline& open = run->run.pipe();
        dit::require(pixels, "pixels");
        open.require_decoder();
        dit::require_room(size, run->run.count(), open.manifest.image_shape(), "bytes");
        const std::vector<std::uint8_t> made = run->run.pictures();
        std::copy(made.begin(), made.end(), pixels);
    });
}

dit_status dit_run_preview(dit_run* run, uint8_t* pixels, size_t size) {
    return dit::guarded(run, [&] {
        const dit::Manifest& manifest = run->run.pipe().manifest;
        dit::require(pixels, "pixels");
        run->run.pipe().require_decoder();
        dit::require_room(size, run->run.count(), manifest.image_shape(), "bytes");
        const std::vector<std::uint8_t> made = run->run.preview();
        std::copy(made.begin(), made.end(), pixels);
    });
}

dit_status dit_run_stats(dit_run* run, dit_stats* stats) {
    return dit::guarded(run, [&] {
        dit_stats filled = dit::known(stats, dit_stats DIT_STATS_INIT, "dit_stats");
        const auto planned = run->run.planned_rows();
        const dit::Timing& timing = run->run.timing();
        filled.done = run->run.done();
        filled.steps = run->run.steps();
        filled.rows = static_cast<int64_t>(run->run.rows());
        filled.planned_rows = planned ? static_cast<int64_t>(*planned) : -1;
        filled.waiting = timing.waiting;
        filled.opening = timing.opening;
        filled.before_loop = timing.before_loop;
        filled.in_steps = timing.steps;
        filled.decoding = timing.end;
        std::memcpy(stats, &filled, stats->struct_size);
    });
}

void dit_run_cancel(dit_run* run) {
    if (run) run->run.cancel();
}

void dit_run_free(dit_run* run) { delete run; }

void dit_set_log(dit_on_log on_log, dit_severity least, void* user) {
    try {
        dit::OnLog log;
        if (on_log)
            log = [=](dit::Severity severity, const std::string& line) {
                on_log(static_cast<dit_severity>(severity), line.c_str(), user);
            };
        dit::set_log(std::move(log), static_cast<dit::Severity>(least));
    } catch (...) {  // no memory: what was there stays
    }
}

const char* dit_last_message(void) { return dit::last_message().c_str(); }

const char* dit_status_name(dit_status status) {
    static const char* const names[] = {"DIT_OK",
                                        "DIT_BAD_ARGUMENT",
                                        "DIT_BAD_BUNDLE",
                                        "DIT_BUFFER_TOO_SMALL",
                                        "DIT_ENGINE_FAILED",
                                        "DIT_STOPPED",
                                        "DIT_NOT_VERIFIED",
                                        "DIT_OUT_OF_MEMORY",
                                        "DIT_BUSY",
                                        "DIT_INTERNAL",
                                        "DIT_NO_BACKEND",
                                        "DIT_NO_DEVICE",
                                        "DIT_DEVICE_LOST",
                                        "DIT_OVERLOADED",
                                        "DIT_LATE",
                                        "DIT_CLOSED"};
    const int number = static_cast<int>(status);
    return number >= 0 && number <= DIT_CLOSED ? names[number] : "unknown status";
}

#define DIT_TEXT(word) DIT_TEXT_OF(word)
#define DIT_TEXT_OF(word) #word

const char* dit_version(void) {
    return DIT_TEXT(DIT_VERSION_MAJOR) "." DIT_TEXT(DIT_VERSION_MINOR) "." DIT_TEXT(DIT_VERSION_PATCH);
}

const char* dit_backends(void) {
    try {
        static const std::string names = [] {
            std::vector<std::string> known;
            for (const dit::Backend& backend : dit::backends()) known.push_back(backend.name + " " + backend.version());
            return dit::join(known);
        }();
        return names.c_str();
    } catch (...) {
        return "";
    }
}

}  // extern "C"
