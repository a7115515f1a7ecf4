// The C ABI: checks what comes in. What describes a bundle is in api_info.cpp.
#include <algorithm>
#include <cmath>
#include <new>

#include "errors.hpp"
#include "handle.hpp"
#include "structs.hpp"
#include "translate.hpp"
#include "verify.hpp"

namespace dit = dit_runtime;

namespace {

// Refuses a buffer in which `count` samples of the row's size do not fit, before any work is done.
void require_room(std::size_t size, std::size_t count, const dit::Shape& row, const char* unit) {
    const std::size_t numbers = dit::count(row);
    if (count > SIZE_MAX / numbers) throw dit::UsageError(dit::text("count is ", count, "; no memory holds that many"));
    if (size < count * numbers)
        throw dit::TooSmall(dit::text("the buffer holds ", size, " ", unit, "; expected ", count * numbers, ", ",
                                      numbers, " for each of ", count));
}

// The bundle that is open, at the request's size.
dit::Pipeline& sized(dit_pipeline* pipe, const dit_request* request) {
    dit::Pipeline& open = dit::opened(pipe);
    const char* const size = dit::known(request, dit_request DIT_REQUEST_INIT, "dit_request").size;
    return open.at(size ? size : "");
}

}  // namespace

extern "C" {

dit_pipeline* dit_new(void) { return new (std::nothrow) dit_pipeline; }

void dit_free(dit_pipeline* pipe) { delete pipe; }

dit_status dit_open(dit_pipeline* pipe, const char* bundle, const dit_open_options* arguments) {
    return dit::guarded(pipe, [&] {
        dit::require(bundle, "bundle");
        if (pipe->open) throw dit::UsageError("this pipeline has a bundle already; take another dit_new");
        dit::Options options;
        std::vector<std::int64_t> warm;
        std::string size;
        if (arguments) {
            const dit_open_options from =
                dit::known(arguments, dit_open_options DIT_OPEN_OPTIONS_INIT, "dit_open_options");
            if (from.backend) options.backend = from.backend;
            if (from.device) options.device = from.device;
            options.threads = from.threads;
            options.low_memory = from.low_memory != 0;
            if (from.num_warm) dit::require(from.warm, "warm");
            if (from.warm) warm.assign(from.warm, from.warm + from.num_warm);
            if (from.size) size = from.size;
        }
        auto open = std::make_unique<dit::Pipeline>(bundle, options, warm, size);
        pipe->backend = open->backend(open->manifest.step()).name;
        pipe->note = open->note();
        pipe->open = std::move(open);
    });
}

dit_status dit_generate(dit_pipeline* pipe, const dit_request* request, uint8_t* pixels, size_t size) {
    return dit::guarded(pipe, [&] {
        dit::Pipeline& open = sized(pipe, request);
        dit::require(pixels, "pixels");
        open.require_decoder();
        require_room(size, dit::counted(request).count, open.manifest.image_shape(), "bytes");
        const std::vector<std::uint8_t> made = open.images(dit::translate(open.manifest, request));
        std::copy(made.begin(), made.end(), pixels);
    });
}

dit_status dit_generate_latents(dit_pipeline* pipe, const dit_request* request, float* latents, size_t size) {
    return dit::guarded(pipe, [&] {
        dit::Pipeline& open = sized(pipe, request);
        dit::require(latents, "latents");
        const dit::Shape& row = open.manifest.state().shape;
        require_room(size, dit::counted(request).count, row, "numbers");
        const std::vector<float> made = open.latents(dit::translate(open.manifest, request));
        std::copy(made.begin(), made.end(), latents);
    });
}

dit_status dit_run_new(dit_pipeline* pipe, const dit_request* request, dit_run** run) {
    if (run) *run = nullptr;
    return dit::guarded(pipe, [&] {
        dit::Pipeline& open = sized(pipe, request);
        dit::require(run, "run");
        require_room(SIZE_MAX, dit::counted(request).count, open.manifest.state().shape, "numbers");
        *run = new dit_run{pipe, {open, dit::translate(open.manifest, request)}};
    });
}

dit_status dit_run_step(dit_run* run, int* more) {
    return dit::guarded(run ? run->pipe : nullptr, [&] {
        dit::require(more, "more");
        *more = run->run.step();
    });
}

dit_status dit_run_latents(dit_run* run, float* latents, size_t size) {
    return dit::guarded(run ? run->pipe : nullptr, [&] {
        dit::require(latents, "latents");
        require_room(size, run->run.count(), run->run.pipe().manifest.state().shape, "numbers");
        const dit::Array& state = run->run.state();
        std::transform(state.begin(), state.end(), latents, [](double value) { return static_cast<float>(value); });
    });
}

dit_status dit_run_rows(dit_run* run, int64_t* rows, int64_t* planned) {
    return dit::guarded(run ? run->pipe : nullptr, [&] {
        dit::require(rows, "rows");
        dit::require(planned, "planned");
        const auto whole = run->run.planned_rows();
        *rows = static_cast<int64_t>(run->run.rows());
        *planned = whole ? static_cast<int64_t>(*whole) : -1;
    });
}

dit_status dit_run_result(dit_run* run, uint8_t* pixels, size_t size) {
    return dit::guarded(run ? run->pipe : nullptr, [&] {
        dit::Pipeline& open = run->run.pipe();
        dit::require(pixels, "pixels");
        open.require_decoder();
        require_room(size, run->run.count(), open.manifest.image_shape(), "bytes");
        const std::vector<std::uint8_t> made = open.pictures(run->run.latents());
        std::copy(made.begin(), made.end(), pixels);
    });
}

void dit_run_cancel(dit_run* run) {
    if (run) run->run.cancel();
}

void dit_run_free(dit_run* run) { delete run; }

dit_status dit_verify(dit_pipeline* pipe, dit_on_check on_check, void* user) {
    return dit::guarded(pipe, [&] {
        std::string failure;
        dit::verify(dit::opened(pipe), [&](const dit::Figure& figure) {
            if (!figure.passed() && failure.empty())
                failure =
                    dit::text(figure.name(), " is ", figure.value, " ", figure.where, ", expected ",
                              std::isinf(figure.limit) ? dit::text("a number")
                                                       : dit::text(figure.at_least ? ">= " : "<= ", figure.limit));
            if (on_check)
                on_check(figure.name().c_str(), figure.value, figure.limit, figure.at_least, figure.passed(),
                         figure.where.c_str(), user);
        });
        if (!failure.empty()) throw dit::NotVerified(failure);
    });
}

const char* dit_message(const dit_pipeline* pipe) {
    return pipe ? pipe->message.c_str() : "the pipeline is NULL; make one with dit_new";
}

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
                                        "DIT_INTERNAL"};
    const int number = static_cast<int>(status);
    return number >= 0 && number <= DIT_INTERNAL ? names[number] : "unknown status";
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
