// dit.hpp: the C++ face of dit.h; header only, so it works with any compiler that libdit's C ABI works with.
//
//     dit::Pipeline pipe("first-bundle");
//     dit::Request request;
//     request.labels = {207, pipe.find_label("otter")};
//     const dit::Images images = pipe.generate(request);  // images.pixels: uint8 [2, height, width, 3]
//
// Failures are dit::Error with the status and the sentence of dit.h. Threads: as dit.h says.
#ifndef DIT_DIT_HPP
#define DIT_DIT_HPP

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "dit/dit.h"

namespace dit {

class Error : public std::runtime_error {
  public:
    Error(dit_status status, const std::string& message) : std::runtime_error(message), status(status) {}
    const dit_status status;
};

struct OpenOptions {
    std::string backend;  // empty: the bundle's own
    std::string device;   // empty: the CPU
    int threads = 0;      // 0: the engine's own choice
    bool low_memory = false;
};

// What a text encoder made of some texts.
struct Captions {
    std::size_t count = 0, tokens = 0;
    std::vector<float> embeddings;  // [count, tokens, numbers a token]
    std::vector<float> mask;        // [count, tokens]: 1 where a caption has a token, else 0; empty: all are tokens
};

struct Request {
    std::vector<std::int64_t> labels;
    std::vector<std::uint64_t> seeds = {0};  // one stream for all, or one a label
    std::vector<float> guidance = {4.0f};    // one, or one a label
    int steps = 25;
    std::string solver, spacing;  // empty: the bundle's
    double eta = 0.0;
    std::vector<float> latents;  // to start from; empty: the seeds' noise
    // Called after each step; true stops the run, and what it throws reaches the caller of generate.
    std::function<bool(int step, int steps, const double* latents, std::size_t size)> on_step;
    Captions captions;  // instead of labels
    Captions negative;  // of an empty text, for guidance: one for all, or one a caption

    std::size_t count() const { return captions.count ? captions.count : labels.size(); }
};

struct Images {
    std::vector<std::uint8_t> pixels;  // [count, height, width, 3]
    std::size_t count = 0, height = 0, width = 0;
};

struct Check {
    std::string name;
    double value, limit;
    bool at_least;  // the value must reach the limit, else not exceed it
    bool passed;
    std::string where;
};

class Pipeline {
  public:
    explicit Pipeline(const std::string& bundle, const OpenOptions& options = {}) : pipe_(dit_new()) {
        if (!pipe_) throw Error(DIT_OUT_OF_MEMORY, "out of memory");
        dit_open_options given = DIT_OPEN_OPTIONS_INIT;
        if (!options.backend.empty()) given.backend = options.backend.c_str();
        if (!options.device.empty()) given.device = options.device.c_str();
        given.threads = options.threads;
        given.low_memory = options.low_memory;
        check(dit_open(pipe_.get(), bundle.c_str(), &given));
        check(dit_get_info(pipe_.get(), &info_));
    }

    // Its strings live as long as the pipeline.
    const dit_info& info() const { return info_; }

    // The name of a class; empty where there is none.
    std::string label(std::int64_t label) const {
        const char* name = dit_label(pipe_.get(), label);
        return name ? name : "";
    }

    std::int64_t find_label(const std::string& name) {
        std::int64_t label = 0;
        check(dit_find_label(pipe_.get(), name.c_str(), &label));
        return label;
    }

    Images generate(const Request& request) {
        Images images;
        images.count = request.count();
        images.height = static_cast<std::size_t>(info_.image_shape[0]);
        images.width = static_cast<std::size_t>(info_.image_shape[1]);
        images.pixels.resize(images.count * images.height * images.width * 3);
        std::uint8_t none = 0;
        std::uint8_t* pixels = images.pixels.empty() ? &none : images.pixels.data();
        run(request,
            [&](const dit_request& given) { return dit_generate(pipe_.get(), &given, pixels, images.pixels.size()); });
        return images;
    }

    // Without decoding: float [count, channels, height, width].
    std::vector<float> generate_latents(const Request& request) {
        std::vector<float> latents(request.count() * row());
        float none = 0;
        float* numbers = latents.empty() ? &none : latents.data();
        run(request, [&](const dit_request& given) {
            return dit_generate_latents(pipe_.get(), &given, numbers, latents.size());
        });
        return latents;
    }

    // All checks against PyTorch's reference; true where all passed. What on_check throws is thrown once they
    // are done.
    bool verify(const std::function<void(const Check&)>& on_check = {}) {
        OnCheck call{on_check, nullptr};
        const dit_status status = dit_verify(pipe_.get(), on_check ? &Pipeline::on_check : nullptr, &call);
        if (call.thrown) std::rethrow_exception(call.thrown);
        if (status != DIT_NOT_VERIFIED) check(status);
        return status == DIT_OK;
    }

    dit_pipeline* get() const { return pipe_.get(); }

  private:
    struct Free {
        void operator()(dit_pipeline* pipe) const { dit_free(pipe); }
    };

    // The caller's function, and what it threw: nothing may pass through C.
    template <typename Function>
    struct Call {
        const Function& function;
        std::exception_ptr thrown;
    };
    using OnStep = Call<decltype(Request::on_step)>;
    using OnCheck = Call<std::function<void(const Check&)>>;

    void check(dit_status status) const {
        if (status == DIT_BUSY) throw Error(status, "another call on this pipeline has not returned");
        if (status != DIT_OK) throw Error(status, dit_message(pipe_.get()));
    }

    static void require(const std::string& name, std::size_t found, std::size_t expected) {
        if (found != expected)
            throw Error(DIT_BAD_ARGUMENT,
                        name + ": " + std::to_string(found) + " numbers; expected " + std::to_string(expected));
    }

    dit_captions to_c(const std::string& name, const Captions& from) const {
        dit_captions captions = DIT_CAPTIONS_INIT;
        captions.count = from.count;
        captions.tokens = from.tokens;
        captions.embeddings = from.embeddings.data();
        const std::size_t tokens = from.count * from.tokens;
        if (info_.caption_shape[1])  // else the library refuses them
            require(name, from.embeddings.size(), tokens * static_cast<std::size_t>(info_.caption_shape[1]));
        if (from.mask.empty()) return captions;
        require("the mask of " + name, from.mask.size(), tokens);
        captions.mask = from.mask.data();
        return captions;
    }

    std::size_t row() const {
        return static_cast<std::size_t>(info_.latent_shape[0] * info_.latent_shape[1] * info_.latent_shape[2]);
    }

    template <typename Generate>
    void run(const Request& request, const Generate& generate) {
        if (!request.latents.empty()) require("latents", request.latents.size(), request.count() * row());
        OnStep step{request.on_step, nullptr};
        dit_request given = DIT_REQUEST_INIT;
        if (!request.labels.empty()) given.labels = request.labels.data();
        given.count = request.count();
        const dit_captions captions = to_c("captions", request.captions), negative = to_c("negative", request.negative);
        if (captions.count) given.captions = &captions;
        if (negative.count) given.negative = &negative;
        given.seeds = request.seeds.data();
        given.num_seeds = request.seeds.size();
        given.guidance = request.guidance.data();
        given.num_guidance = request.guidance.size();
        given.steps = request.steps;
        if (!request.solver.empty()) given.solver = request.solver.c_str();
        if (!request.spacing.empty()) given.spacing = request.spacing.c_str();
        given.eta = request.eta;
        if (!request.latents.empty()) given.latents = request.latents.data();
        if (request.on_step) given.on_step = &Pipeline::on_step;
        given.user = &step;
        const dit_status status = generate(given);
        if (step.thrown) std::rethrow_exception(step.thrown);
        check(status);
    }

    static int on_step(int number, int steps, const double* latents, std::size_t size, void* user) {
        OnStep& call = *static_cast<OnStep*>(user);
        try {
            return call.function(number, steps, latents, size);
        } catch (...) {
            call.thrown = std::current_exception();
            return 1;
        }
    }

    static void on_check(const char* name, double value, double limit, int at_least, int passed, const char* where,
                         void* user) {
        OnCheck& call = *static_cast<OnCheck*>(user);
        try {
            if (!call.thrown) call.function({name, value, limit, at_least != 0, passed != 0, where});
        } catch (...) {
            call.thrown = std::current_exception();
        }
    }

    std::unique_ptr<dit_pipeline, Free> pipe_;
    dit_info info_ = DIT_INFO_INIT;
};

}  // namespace dit

#endif  // DIT_DIT_HPP
