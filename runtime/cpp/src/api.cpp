// The C ABI: checks what comes in, and is the one place where exceptions end.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <new>

#include "dit/dit.h"
#include "errors.hpp"
#include "pipeline.hpp"
#include "run.hpp"
#include "structs.hpp"
#include "translate.hpp"
#include "verify.hpp"

namespace dit = dit_runtime;

struct dit_pipeline {
    std::unique_ptr<dit::Pipeline> open;
    std::string backend;  // of the denoiser
    std::string note;
    std::string message;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
};

struct dit_run {
    dit_pipeline* pipe;
    dit::Run run;
};

namespace {

struct TooSmall : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct NotVerified : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Busy {
  public:
    explicit Busy(std::atomic_flag& flag) : flag_(flag), mine(!flag.test_and_set(std::memory_order_acquire)) {}
    ~Busy() {
        if (mine) flag_.clear(std::memory_order_release);
    }
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;

  private:
    std::atomic_flag& flag_;

  public:
    const bool mine;
};

// Keeps the sentence; without memory for it, the status alone says what happened.
dit_status failed(dit_pipeline* pipe, dit_status status, const char* message) noexcept {
    try {
        pipe->message = message;
    } catch (...) {
        pipe->message.clear();
    }
    return status;
}

template <typename Call>
dit_status guarded(dit_pipeline* pipe, const Call& call) noexcept {
    if (!pipe) return DIT_BAD_ARGUMENT;
    const Busy busy(pipe->busy);
    if (!busy.mine) return DIT_BUSY;
    pipe->message.clear();
    try {
        call();
        return DIT_OK;
    } catch (const dit::BundleError& error) {
        return failed(pipe, DIT_BAD_BUNDLE, error.what());
    } catch (const dit::UsageError& error) {
        return failed(pipe, DIT_BAD_ARGUMENT, error.what());
    } catch (const TooSmall& error) {
        return failed(pipe, DIT_BUFFER_TOO_SMALL, error.what());
    } catch (const NotVerified& error) {
        return failed(pipe, DIT_NOT_VERIFIED, error.what());
    } catch (const dit::EngineError& error) {
        return failed(pipe, DIT_ENGINE_FAILED, error.what());
    } catch (const dit::Stopped& error) {
        return failed(pipe, DIT_STOPPED, error.what());
    } catch (const std::bad_alloc&) {
        return failed(pipe, DIT_OUT_OF_MEMORY, "out of memory; try fewer pictures at a time, or low_memory");
    } catch (const std::length_error&) {
        return failed(pipe, DIT_OUT_OF_MEMORY, "out of memory; try fewer pictures at a time, or low_memory");
    } catch (const std::exception& error) {
        return failed(pipe, DIT_INTERNAL, error.what());
    } catch (...) {
        return failed(pipe, DIT_INTERNAL, "an exception that is no std::exception");
    }
}

dit::Pipeline& opened(dit_pipeline* pipe) {
    if (!pipe->open) throw dit::UsageError("no bundle is open in this pipeline; call dit_open first");
    return *pipe->open;
}

// Whether the build measured rows of the loop and of the decoder on the engines that run them here.
bool measured_here(const dit::Pipeline& pipe) {
    return std::all_of(pipe.manifest.stages.begin(), pipe.manifest.stages.end(), [&](const dit::Stage& stage) {
        return (stage.runs != "step" && stage.runs != "end") ||
               (pipe.on_cpu(stage) && pipe.backend(stage).name == stage.backend);
    });
}

// Refuses a buffer in which `count` samples of the row's size do not fit, before any work is done.
void require_room(std::size_t size, std::size_t count, const dit::Shape& row, const char* unit) {
    const std::size_t numbers = dit::count(row);
    if (count > SIZE_MAX / numbers) throw dit::UsageError(dit::text("count is ", count, "; no memory holds that many"));
    if (size < count * numbers)
        throw TooSmall(dit::text("the buffer holds ", size, " ", unit, "; expected ", count * numbers, ", ", numbers,
                                 " for each of ", count));
}

}  // namespace

extern "C" {

dit_pipeline* dit_new(void) { return new (std::nothrow) dit_pipeline; }

void dit_free(dit_pipeline* pipe) { delete pipe; }

dit_status dit_open(dit_pipeline* pipe, const char* bundle, const dit_open_options* arguments) {
    return guarded(pipe, [&] {
        dit::require(bundle, "bundle");
        if (pipe->open) throw dit::UsageError("this pipeline has a bundle already; take another dit_new");
        dit::Options options;
        std::vector<std::int64_t> warm;
        if (arguments) {
            const dit_open_options from =
                dit::known(arguments, dit_open_options DIT_OPEN_OPTIONS_INIT, "dit_open_options");
            if (from.backend) options.backend = from.backend;
            if (from.device) options.device = from.device;
            options.threads = from.threads;
            options.low_memory = from.low_memory != 0;
            if (from.num_warm) dit::require(from.warm, "warm");
            if (from.warm) warm.assign(from.warm, from.warm + from.num_warm);
        }
        auto open = std::make_unique<dit::Pipeline>(bundle, options, warm);
        pipe->backend = open->backend(open->manifest.step()).name;
        pipe->note = open->note();
        pipe->open = std::move(open);
    });
}

dit_status dit_get_info(dit_pipeline* pipe, dit_info* info) {
    return guarded(pipe, [&] {
        dit_info filled = dit::known(info, dit_info DIT_INFO_INIT, "dit_info");
        const dit::Manifest& manifest = opened(pipe).manifest;
        const dit::Shape image = manifest.image_shape(), &state = manifest.state().shape;
        filled.num_classes = manifest.classes();
        filled.has_labels = !manifest.labels.empty();
        for (std::size_t axis = 0; axis < 3; ++axis) {
            filled.latent_shape[axis] = state.size() == 3 ? state[axis] : 0;
            filled.image_shape[axis] = image.empty() ? 0 : image[(axis + 1) % 3];
        }
        const dit::Port* const captions = manifest.port("captions");
        for (std::size_t axis = 0; axis < 2; ++axis)
            filled.caption_shape[axis] = captions && captions->shape.size() == 2 ? captions->shape[axis] : 0;
        filled.state_rank = static_cast<int>(state.size());
        std::copy(state.begin(), state.end(), filled.state_shape);
        filled.max_batch = manifest.step().max_batch;
        filled.train_steps = manifest.process.train_steps;
        filled.model = manifest.model_name.c_str();
        filled.solver = manifest.process.sampler.solver.c_str();
        filled.backend = pipe->backend.c_str();
        filled.precision = manifest.step().precision.c_str();
        filled.note = pipe->note.c_str();
        filled.batch_invariant = manifest.batch_invariant && measured_here(*pipe->open);
        std::memcpy(info, &filled, info->struct_size);
    });
}

size_t dit_port_count(const dit_pipeline* pipe) {
    return pipe && pipe->open
               ? static_cast<size_t>(std::count_if(pipe->open->manifest.ports.begin(), pipe->open->manifest.ports.end(),
                                                   [](const dit::Port& port) { return port.role == "condition"; }))
               : 0;
}

dit_status dit_get_port(dit_pipeline* pipe, size_t index, dit_port* port) {
    return guarded(pipe, [&] {
        dit_port filled = dit::known(port, dit_port DIT_PORT_INIT, "dit_port");
        const dit::Manifest& manifest = opened(pipe).manifest;
        const std::size_t count = dit_port_count(pipe);
        if (index >= count) throw dit::UsageError(dit::text("port ", index, " is not there; this bundle has ", count));
        const dit::Port& from = *manifest.port(manifest.conditions()[index].name);
        filled.name = from.name.c_str();
        filled.dtype = from.dtype == "int64" ? DIT_INT64 : DIT_FLOAT32;
        filled.rank = static_cast<int>(from.shape.size());
        std::copy(from.shape.begin(), from.shape.end(), filled.shape);
        filled.size = from.size;
        filled.masks = from.masks.c_str();
        filled.has_null = manifest.null.count(from.name) != 0;
        std::memcpy(port, &filled, port->struct_size);
    });
}

const char* dit_label(const dit_pipeline* pipe, int64_t label) {
    if (!pipe || !pipe->open) return nullptr;
    const auto& labels = pipe->open->manifest.labels;
    if (label < 0 || static_cast<std::uint64_t>(label) >= labels.size()) return nullptr;
    return labels[static_cast<std::size_t>(label)].c_str();
}

dit_status dit_find_label(dit_pipeline* pipe, const char* name, int64_t* label) {
    return guarded(pipe, [&] {
        dit::require(name, "name");
        dit::require(label, "label");
        *label = dit::class_number(opened(pipe).manifest, name);
    });
}

dit_status dit_generate(dit_pipeline* pipe, const dit_request* request, uint8_t* pixels, size_t size) {
    return guarded(pipe, [&] {
        dit::Pipeline& open = opened(pipe);
        dit::require(request, "dit_request");
        dit::require(pixels, "pixels");
        open.require_decoder();
        require_room(size, dit::counted(request).count, open.manifest.image_shape(), "bytes");
        const std::vector<std::uint8_t> made = open.images(dit::translate(open.manifest, request));
        std::copy(made.begin(), made.end(), pixels);
    });
}

dit_status dit_generate_latents(dit_pipeline* pipe, const dit_request* request, float* latents, size_t size) {
    return guarded(pipe, [&] {
        dit::Pipeline& open = opened(pipe);
        dit::require(request, "dit_request");
        dit::require(latents, "latents");
        const dit::Shape& row = open.manifest.state().shape;
        require_room(size, dit::counted(request).count, row, "numbers");
        const std::vector<float> made = open.latents(dit::translate(open.manifest, request));
        std::copy(made.begin(), made.end(), latents);
    });
}

dit_status dit_run_new(dit_pipeline* pipe, const dit_request* request, dit_run** run) {
    if (run) *run = nullptr;
    return guarded(pipe, [&] {
        dit::Pipeline& open = opened(pipe);
        dit::require(request, "dit_request");
        dit::require(run, "run");
        require_room(SIZE_MAX, dit::counted(request).count, open.manifest.state().shape, "numbers");
        *run = new dit_run{pipe, {open, dit::translate(open.manifest, request)}};
    });
}

dit_status dit_run_step(dit_run* run, int* more) {
    return guarded(run ? run->pipe : nullptr, [&] {
        dit::require(more, "more");
        *more = run->run.step();
    });
}

dit_status dit_run_latents(dit_run* run, float* latents, size_t size) {
    return guarded(run ? run->pipe : nullptr, [&] {
        dit::require(latents, "latents");
        require_room(size, run->run.count(), opened(run->pipe).manifest.state().shape, "numbers");
        const dit::Array& state = run->run.state();
        std::transform(state.begin(), state.end(), latents, [](double value) { return static_cast<float>(value); });
    });
}

dit_status dit_run_result(dit_run* run, uint8_t* pixels, size_t size) {
    return guarded(run ? run->pipe : nullptr, [&] {
        dit::Pipeline& open = opened(run->pipe);
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
    return guarded(pipe, [&] {
        std::string failure;
        dit::verify(opened(pipe), [&](const dit::Figure& figure) {
            if (!figure.passed() && failure.empty())
                failure =
                    dit::text(figure.name(), " is ", figure.value, " ", figure.where, ", expected ",
                              std::isinf(figure.limit) ? dit::text("a number")
                                                       : dit::text(figure.at_least ? ">= " : "<= ", figure.limit));
            if (on_check)
                on_check(figure.name().c_str(), figure.value, figure.limit, figure.at_least, figure.passed(),
                         figure.where.c_str(), user);
        });
        if (!failure.empty()) throw NotVerified(failure);
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
