// The C ABI: checks what comes in, and is the one place where exceptions end.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <new>

#include "dit/dit.h"
#include "errors.hpp"
#include "pipeline.hpp"
#include "run.hpp"
#include "verify.hpp"

namespace dit = dit_runtime;

struct dit_pipeline {
    std::unique_ptr<dit::Pipeline> open;
    std::string backend;  // that the denoiser runs on
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

// Keeps the sentence; where there is no memory even for that, the status alone has to do.
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

void require(const void* pointer, const char* name) {
    if (!pointer) throw dit::UsageError(dit::text(name, " is NULL"));
}

dit::Pipeline& opened(dit_pipeline* pipe) {
    if (!pipe->open) throw dit::UsageError("no bundle is open in this pipeline; call dit_open first");
    return *pipe->open;
}

// What the structs began as; what came later is at their ends.
template <typename Struct>
constexpr std::size_t first_version = sizeof(Struct);
template <>
constexpr std::size_t first_version<dit_info> = offsetof(dit_info, caption_shape);
template <>
constexpr std::size_t first_version<dit_request> = offsetof(dit_request, captions);
template <>
constexpr std::size_t first_version<dit_captions> = offsetof(dit_captions, size);

// The caller's struct on top of our defaults, as far as its version of it goes.
template <typename Struct>
Struct known(const Struct* given, Struct defaults, const char* name) {
    require(given, name);
    const std::size_t size = given->struct_size;
    if (size < first_version<Struct>)
        throw dit::UsageError(dit::text(name, ".struct_size is ", size, "; start from the _INIT value of dit.h"));
    if (size > sizeof(Struct))
        throw dit::UsageError(dit::text(name, ".struct_size is ", size, ", but libdit ", dit_version(), " knows ",
                                        sizeof(Struct), " bytes of it: the program needs a newer libdit"));
    std::memcpy(&defaults, given, size);
    return defaults;
}

// Where the caller's structs stand one after the other, in the size that their first one names.
dit_array array_at(const dit_array* arrays, std::size_t index) {
    const std::size_t stride = known(arrays, dit_array DIT_ARRAY_INIT, "dit_array").struct_size;
    const auto* const place = reinterpret_cast<const unsigned char*>(arrays) + index * stride;
    return known(reinterpret_cast<const dit_array*>(place), dit_array DIT_ARRAY_INIT, "dit_array");
}

// Numbers as rows of a port: its shape, of fewer tokens where there are fewer numbers.
dit::Tensor rows_of(const dit::Manifest& manifest, const dit_array& from) {
    const dit::Port* port = manifest.port(from.name);
    if (port && port->role != "condition") port = nullptr;  // to be refused by name
    if (!from.floats == !from.integers)
        throw dit::UsageError(dit::text(from.name, ": expected either floats or integers, the other NULL"));
    if (!from.rows || !from.size || from.size % from.rows)
        throw dit::UsageError(dit::text(from.name, " has ", from.size, " numbers in ", from.rows,
                                        " rows; expected a multiple of its rows, one or more"));
    dit::Shape shape = port ? port->shape : dit::Shape();
    const std::size_t row = from.size / from.rows;
    if (row != dit::count(shape)) {
        const std::size_t token = shape.empty() ? 0 : dit::count({shape.begin() + 1, shape.end()});
        if (port && (!token || row % token))
            throw dit::UsageError(dit::text(from.name, " has ", row, " numbers a row; expected ", dit::shown(shape)));
        if (token) shape[0] = static_cast<std::int64_t>(row / token);
    }
    shape.insert(shape.begin(), static_cast<std::int64_t>(from.rows));
    dit::Tensor tensor{shape};
    if (from.floats) tensor.floats.assign(from.floats, from.floats + from.size);
    if (from.integers) tensor.integers.assign(from.integers, from.integers + from.size);
    return tensor;
}

void add(const dit::Manifest& manifest, const dit_array* arrays, std::size_t count, const char* what, dit::Arrays& to) {
    if (count) require(arrays, what);
    for (std::size_t index = 0; index < count; ++index) {
        const dit_array from = array_at(arrays, index);
        require(from.name, "dit_array.name");
        if (to.count(from.name)) throw dit::UsageError(dit::text(what, ": ", from.name, " is there twice"));
        to[from.name] = rows_of(manifest, from);
    }
}

// Captions as the ports that they are.
void add(const dit::Manifest& manifest, const dit_captions* given, const char* what, dit::Arrays& to) {
    if (!given) return;
    const dit_captions from = known(given, dit_captions DIT_CAPTIONS_INIT, "dit_captions");
    const dit::Port* const port = manifest.port("captions");
    if (!port || port->shape.size() != 2)
        throw dit::UsageError(dit::text(
            "this bundle takes no ", what,
            manifest.classes() ? dit::text("; it takes labels, 0 to ", manifest.classes() - 1) : std::string()));
    const auto most = static_cast<std::size_t>(port->shape[0]), channels = static_cast<std::size_t>(port->shape[1]);
    if (!from.count || !from.tokens || from.tokens > most)
        throw dit::UsageError(dit::text(what, " are ", from.count, " of ", from.tokens,
                                        " tokens; expected one or more, of up to ", most));
    require(from.embeddings, "embeddings");
    if (from.count > SIZE_MAX / (from.tokens * channels * sizeof(float)))
        throw dit::UsageError(dit::text(what, " are ", from.count, "; no memory holds that many"));
    const std::size_t numbers = from.count * from.tokens, size = numbers * channels;
    if (from.size && from.size != size)
        throw dit::UsageError(dit::text(what, ": ", from.size, " numbers; expected ", size));
    const auto rows = static_cast<std::int64_t>(from.count), tokens = static_cast<std::int64_t>(from.tokens);
    to["captions"] = {{rows, tokens, port->shape[1]}, {from.embeddings, from.embeddings + size}};
    if (from.mask) to["mask"] = {{rows, tokens}, {from.mask, from.mask + numbers}};
}

// The caller's request, with the number of its pictures in `count`.
dit_request counted(const dit_request* given) {
    dit_request request = known(given, dit_request DIT_REQUEST_INIT, "dit_request");
    if (request.captions && request.labels) throw dit::UsageError("got both labels and captions: pass one of them");
    if (request.labels) return request;  // as many as count says
    std::size_t count = 0;
    if (request.captions) count = known(request.captions, dit_captions DIT_CAPTIONS_INIT, "dit_captions").count;
    if (!request.captions && request.num_arrays) {
        require(request.arrays, "arrays");
        count = array_at(request.arrays, 0).rows;
    }
    if (!count && !request.captions) return request;
    if (request.count && request.count != count)
        throw dit::UsageError(
            dit::text("count is ", request.count, ", of ", request.captions ? "captions " : "rows of arrays ", count));
    request.count = count;
    return request;
}

dit::Request translate(const dit::Manifest& manifest, const dit_request* given) {
    const dit_request from = counted(given);
    dit::Request request;
    add(manifest, from.captions, "captions", request.condition);
    add(manifest, from.negative, "negative captions", request.negative);
    add(manifest, from.arrays, from.num_arrays, "arrays", request.condition);
    add(manifest, from.negative_arrays, from.num_negative_arrays, "negative_arrays", request.negative);
    const bool others = !request.condition.empty() || manifest.conditions().empty();
    if (from.count && !others) require(from.labels, "labels");
    if (from.labels) request.labels.assign(from.labels, from.labels + from.count);
    request.count = from.count;
    if (from.num_seeds) require(from.seeds, "seeds");
    if (from.seeds) request.seeds.assign(from.seeds, from.seeds + from.num_seeds);
    if (from.num_guidance) require(from.guidance, "guidance");
    if (from.guidance) request.guidance.assign(from.guidance, from.guidance + from.num_guidance);
    if (from.steps) request.steps = from.steps;
    if (from.solver) request.solver = from.solver;
    if (from.spacing) request.spacing = from.spacing;
    request.eta = from.eta;
    if (from.latents) {
        const std::size_t size = from.count * dit::count(manifest.state().shape);
        if (from.latents_size && from.latents_size != size)
            throw dit::UsageError(
                dit::text("latents have ", from.latents_size, " numbers; expected ", size, ", all finite"));
        request.latents.emplace(from.latents, from.latents + size);
    }
    if (from.on_step)
        request.on_step = [call = from.on_step, user = from.user](int step, int steps, const dit::Array& latents) {
            return call(step, steps, latents.data(), latents.size(), user) != 0;
        };
    return request;
}

// Whether `count` samples of the row's size fit into the caller's buffer, before any work is done.
void require_room(std::size_t size, std::size_t count, const dit::Shape& row, const char* unit) {
    const std::size_t one = dit::count(row);
    if (count > SIZE_MAX / one) throw dit::UsageError(dit::text("count is ", count, "; no memory holds that many"));
    if (size < count * one)
        throw TooSmall(dit::text("the buffer holds ", size, " ", unit, "; expected ", count * one, ", ", one,
                                 " for each of ", count));
}

}  // namespace

extern "C" {

dit_pipeline* dit_new(void) { return new (std::nothrow) dit_pipeline; }

void dit_free(dit_pipeline* pipe) { delete pipe; }

dit_status dit_open(dit_pipeline* pipe, const char* bundle, const dit_open_options* given) {
    return guarded(pipe, [&] {
        require(bundle, "bundle");
        if (pipe->open) throw dit::UsageError("this pipeline has a bundle already; take another dit_new");
        dit::Options options;
        if (given) {
            const dit_open_options from = known(given, dit_open_options DIT_OPEN_OPTIONS_INIT, "dit_open_options");
            if (from.backend) options.backend = from.backend;
            if (from.device) options.device = from.device;
            options.threads = from.threads;
            options.low_memory = from.low_memory != 0;
        }
        auto open = std::make_unique<dit::Pipeline>(bundle, options);
        pipe->backend = open->backend(open->manifest.step()).name;
        pipe->open = std::move(open);
    });
}

dit_status dit_get_info(dit_pipeline* pipe, dit_info* info) {
    return guarded(pipe, [&] {
        dit_info told = known(info, dit_info DIT_INFO_INIT, "dit_info");
        const dit::Manifest& manifest = opened(pipe).manifest;
        const dit::Shape image = manifest.image_shape(), &state = manifest.state().shape;
        told.num_classes = manifest.classes();
        told.has_labels = !manifest.labels.empty();
        for (std::size_t axis = 0; axis < 3; ++axis) {
            told.latent_shape[axis] = state.size() == 3 ? state[axis] : 0;
            told.image_shape[axis] = image.empty() ? 0 : image[(axis + 1) % 3];
        }
        const dit::Port* const captions = manifest.port("captions");
        for (std::size_t axis = 0; axis < 2; ++axis)
            told.caption_shape[axis] = captions && captions->shape.size() == 2 ? captions->shape[axis] : 0;
        told.state_rank = static_cast<int>(state.size());
        std::copy(state.begin(), state.end(), told.state_shape);
        told.max_batch = manifest.step().max_batch;
        told.train_steps = manifest.process.train_steps;
        told.model = manifest.model_name.c_str();
        told.solver = manifest.process.sampler.solver.c_str();
        told.backend = pipe->backend.c_str();
        told.precision = manifest.step().precision.c_str();
        std::memcpy(info, &told, info->struct_size);
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
        dit_port told = known(port, dit_port DIT_PORT_INIT, "dit_port");
        const dit::Manifest& manifest = opened(pipe).manifest;
        const std::size_t count = dit_port_count(pipe);
        if (index >= count) throw dit::UsageError(dit::text("port ", index, " is not there; this bundle has ", count));
        const dit::Port& from = *manifest.port(manifest.conditions()[index].name);
        told.name = from.name.c_str();
        told.dtype = from.dtype == "int64" ? DIT_INT64 : DIT_FLOAT32;
        told.rank = static_cast<int>(from.shape.size());
        std::copy(from.shape.begin(), from.shape.end(), told.shape);
        told.size = from.size;
        told.masks = from.masks.c_str();
        told.has_null = manifest.null.count(from.name) != 0;
        std::memcpy(port, &told, port->struct_size);
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
        require(name, "name");
        require(label, "label");
        *label = dit::class_number(opened(pipe).manifest, name);
    });
}

dit_status dit_generate(dit_pipeline* pipe, const dit_request* given, uint8_t* pixels, size_t size) {
    return guarded(pipe, [&] {
        dit::Pipeline& open = opened(pipe);
        require(given, "dit_request");
        require(pixels, "pixels");
        open.require_decoder();
        require_room(size, counted(given).count, open.manifest.image_shape(), "bytes");
        const std::vector<std::uint8_t> made = open.images(translate(open.manifest, given));
        require_room(size, made.size() / dit::count(open.manifest.image_shape()), open.manifest.image_shape(), "bytes");
        std::copy(made.begin(), made.end(), pixels);
    });
}

dit_status dit_generate_latents(dit_pipeline* pipe, const dit_request* given, float* latents, size_t size) {
    return guarded(pipe, [&] {
        dit::Pipeline& open = opened(pipe);
        require(given, "dit_request");
        require(latents, "latents");
        const dit::Shape& row = open.manifest.state().shape;
        require_room(size, counted(given).count, row, "numbers");
        const std::vector<float> made = open.latents(translate(open.manifest, given));
        require_room(size, made.size() / dit::count(row), row, "numbers");
        std::copy(made.begin(), made.end(), latents);
    });
}

dit_status dit_run_new(dit_pipeline* pipe, const dit_request* given, dit_run** run) {
    return guarded(pipe, [&] {
        dit::Pipeline& open = opened(pipe);
        require(given, "dit_request");
        require(run, "run");
        const std::size_t one = dit::count(open.manifest.state().shape);
        require_room(SIZE_MAX, counted(given).count, {static_cast<std::int64_t>(one)}, "numbers");
        *run = new dit_run{pipe, {open, translate(open.manifest, given)}};
    });
}

dit_status dit_run_step(dit_run* run, int* more) {
    return guarded(run ? run->pipe : nullptr, [&] {
        require(more, "more");
        *more = run->run.step();
    });
}

dit_status dit_run_latents(dit_run* run, float* latents, size_t size) {
    return guarded(run ? run->pipe : nullptr, [&] {
        require(latents, "latents");
        require_room(size, run->run.count(), opened(run->pipe).manifest.state().shape, "numbers");
        const dit::Array& state = run->run.state();
        std::transform(state.begin(), state.end(), latents, [](double value) { return static_cast<float>(value); });
    });
}

dit_status dit_run_result(dit_run* run, uint8_t* pixels, size_t size) {
    return guarded(run ? run->pipe : nullptr, [&] {
        dit::Pipeline& open = opened(run->pipe);
        require(pixels, "pixels");
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
        dit::verify(opened(pipe), [&](const dit::Check& check) {
            if (!check.passed() && failure.empty())
                failure = dit::text(check.name, " is ", check.value, " ", check.where, ", expected ",
                                    check.at_least ? ">= " : "<= ", check.limit);
            if (on_check)
                on_check(check.name.c_str(), check.value, check.limit, check.at_least, check.passed(),
                         check.where.c_str(), user);
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
            std::vector<std::string> found;
            for (const dit::Backend& backend : dit::backends()) found.push_back(backend.name + " " + backend.version());
            return dit::join(found);
        }();
        return names.c_str();
    } catch (...) {
        return "";
    }
}

}  // extern "C"
