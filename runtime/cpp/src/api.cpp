// The C ABI: checks what comes in, and is the one place where exceptions end.
#include <atomic>
#include <cstddef>
#include <cstring>
#include <new>

#include "dit/dit.h"
#include "errors.hpp"
#include "pipeline.hpp"
#include "verify.hpp"

namespace dit = dit_runtime;

struct dit_pipeline {
    std::unique_ptr<dit::Pipeline> open;
    std::string backend;  // that the denoiser runs on
    std::string message;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
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

dit::Given translate(const dit_captions* given) {
    const dit_captions from = known(given, dit_captions DIT_CAPTIONS_INIT, "dit_captions");
    if (from.count) require(from.embeddings, "embeddings");
    return {from.count, from.tokens, from.embeddings, from.mask};
}

// The caller's request, with the number of its pictures in `count`.
dit_request counted(const dit_request* given) {
    dit_request request = known(given, dit_request DIT_REQUEST_INIT, "dit_request");
    if (!request.captions) return request;
    const std::size_t count = translate(request.captions).count;
    if (request.labels) throw dit::UsageError("got both labels and captions: pass one of them");
    if (request.count && request.count != count)
        throw dit::UsageError(dit::text("count is ", request.count, ", of captions ", count));
    request.count = count;
    return request;
}

dit::Request translate(const dit::Pipeline& pipe, const dit_request* given) {
    const dit_request from = counted(given);
    dit::Request request;
    if (from.captions) request.captions = translate(from.captions);
    if (from.negative) request.negative = translate(from.negative);
    if (from.count && !from.captions) require(from.labels, "labels");
    if (from.labels) request.labels.assign(from.labels, from.labels + from.count);
    if (from.num_seeds) require(from.seeds, "seeds");
    if (from.seeds) request.seeds.assign(from.seeds, from.seeds + from.num_seeds);
    if (from.num_guidance) require(from.guidance, "guidance");
    if (from.guidance) request.guidance.assign(from.guidance, from.guidance + from.num_guidance);
    if (from.steps) request.steps = from.steps;
    if (from.solver) request.solver = from.solver;
    if (from.spacing) request.spacing = from.spacing;
    request.eta = from.eta;
    if (from.latents)
        request.latents.emplace(from.latents, from.latents + from.count * dit::count(pipe.manifest.latent_shape));
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
        pipe->backend = open->backend("denoiser").name;
        pipe->open = std::move(open);
    });
}

dit_status dit_get_info(dit_pipeline* pipe, dit_info* info) {
    return guarded(pipe, [&] {
        dit_info told = known(info, dit_info DIT_INFO_INIT, "dit_info");
        const dit::Manifest& manifest = opened(pipe).manifest;
        const dit::Shape image = opened(pipe).image_shape();
        told.num_classes = manifest.num_classes;
        told.has_labels = !manifest.labels.empty();
        for (std::size_t axis = 0; axis < 3; ++axis) {
            told.latent_shape[axis] = manifest.latent_shape[axis];
            told.image_shape[axis] = image.empty() ? 0 : image[(axis + 1) % 3];
        }
        const dit::Shape caption = manifest.caption_shape();
        for (std::size_t axis = 0; axis < caption.size(); ++axis) told.caption_shape[axis] = caption[axis];
        told.max_batch = manifest.graphs.at("denoiser").max_batch;
        told.train_steps = manifest.diffusion.train_steps;
        told.model = manifest.model_name.c_str();
        told.solver = manifest.diffusion.sampler.solver.c_str();
        told.backend = pipe->backend.c_str();
        told.precision = manifest.graphs.at("denoiser").precision.c_str();
        std::memcpy(info, &told, info->struct_size);
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
        *label = opened(pipe).label_id(name);
    });
}

dit_status dit_generate(dit_pipeline* pipe, const dit_request* given, uint8_t* pixels, size_t size) {
    return guarded(pipe, [&] {
        dit::Pipeline& open = opened(pipe);
        require(given, "dit_request");
        require(pixels, "pixels");
        open.require_decoder();
        require_room(size, counted(given).count, open.image_shape(), "bytes");
        const std::vector<std::uint8_t> made = open.images(translate(open, given));
        std::copy(made.begin(), made.end(), pixels);
    });
}

dit_status dit_generate_latents(dit_pipeline* pipe, const dit_request* given, float* latents, size_t size) {
    return guarded(pipe, [&] {
        dit::Pipeline& open = opened(pipe);
        require(given, "dit_request");
        require(latents, "latents");
        require_room(size, counted(given).count, open.manifest.latent_shape, "numbers");
        const std::vector<float> made = open.latents(translate(open, given));
        std::copy(made.begin(), made.end(), latents);
    });
}

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
