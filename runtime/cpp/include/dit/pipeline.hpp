// An open bundle. Included by dit.hpp.
#ifndef DIT_PIPELINE_HPP
#define DIT_PIPELINE_HPP

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dit/types.hpp"

namespace dit {

class Run;

// An open bundle. Copies are the same one, and any thread may use it at any time.
class Pipeline {
  public:
    explicit Pipeline(const std::string& bundle, const OpenOptions& options = {}) {
        dit_open_options from = DIT_OPEN_OPTIONS_INIT;
        if (!options.backend.empty()) from.backend = options.backend.c_str();
        if (!options.device.empty()) from.device = options.device.c_str();
        from.threads = options.threads;
        from.low_memory = options.low_memory;
        if (!options.warm.empty()) from.warm = options.warm.data();
        from.num_warm = options.warm.size();
        if (!options.size.empty()) from.size = options.size.c_str();
        if (!options.manifest_sha256.empty()) from.manifest_sha256 = options.manifest_sha256.c_str();
        const std::uint8_t none = 0;
        if (options.public_key) from.public_key = options.public_key->empty() ? &none : options.public_key->data();
        if (options.public_key) from.public_key_size = options.public_key->size();
        std::vector<dit_setting> settings;
        for (const Setting& setting : options.settings)
            settings.push_back(
                {setting.stage.empty() ? nullptr : setting.stage.c_str(), setting.key.c_str(), setting.value.c_str()});
        if (!settings.empty()) from.settings = settings.data();
        from.num_settings = settings.size();
        from.cancellation = options.cancellation.get();
        from.max_bytes = options.max_bytes;
        OnProgress call{options.on_progress, nullptr};
        if (options.on_progress) from.on_progress = &Pipeline::on_progress;
        from.user = &call;
        dit_model* opened = nullptr;
        const dit_status status = dit_model_open(bundle.c_str(), &from, &opened);
        if (call.thrown) std::rethrow_exception(call.thrown);
        check(status);
        model_.reset(opened, dit_model_release);
        check(dit_model_info(opened, &info_));
    }

    // Its strings live as long as the pipeline.
    const dit_info& info() const { return info_; }

    // The name of a class; empty where there is none.
    std::string label(std::int64_t label) const {
        const char* name = dit_model_label(get(), label);
        return name ? name : "";
    }

    // The names of the bundle's presets.
    std::vector<std::string> presets() const {
        std::vector<std::string> names;
        while (const char* const name = dit_model_preset(get(), names.size())) names.emplace_back(name);
        return names;
    }

    std::int64_t find_label(const std::string& name) const {
        std::int64_t label = 0;
        check(dit_model_find_label(get(), name.c_str(), &label));
        return label;
    }

    // The sizes that the bundle draws; the first is what requests without a size draw.
    std::vector<Size> sizes() const {
        std::vector<Size> all;
        for (std::size_t index = 0; index < info_.num_sizes; ++index) {
            dit_size size = DIT_SIZE_INIT;
            check(dit_model_size(get(), index, &size));
            all.push_back({size.name,
                           {size.state_shape, size.state_shape + size.state_rank},
                           static_cast<std::size_t>(size.image_shape[0]),
                           static_cast<std::size_t>(size.image_shape[1]),
                           static_cast<std::size_t>(size.frames)});
        }
        return all;
    }

    // The size that a request draws.
    Size size_of(const Request& request) const {
        const std::vector<Size> all = sizes();
        for (const Size& size : all)
            if (size.name == request.size || size.name + "x" + size.name == request.size) return size;
        return all.front();  // where it has no such size, the call says so
    }

    // The ports that condition the network.
    std::vector<Port> ports() const {
        std::vector<Port> all;
        for (std::size_t index = 0; index < info_.num_ports; ++index) {
            dit_port port = DIT_PORT_INIT;
            check(dit_model_port(get(), index, &port));
            all.push_back({port.name,
                           port.dtype,
                           {port.shape, port.shape + port.rank},
                           port.size,
                           port.masks,
                           port.has_null != 0});
        }
        return all;
    }

    // What a prompt becomes; empty where the bundle has no text encoders.
    std::vector<Prompt> prompts() const {
        std::vector<Prompt> all;
        for (std::size_t index = 0; index < info_.num_prompts; ++index) {
            dit_prompt prompt = DIT_PROMPT_INIT;
            check(dit_model_prompt(get(), index, &prompt));
            all.push_back({prompt.ids, prompt.mask, prompt.tokens, prompt.size, prompt.tokenizer,
                           prompt.prompt_template, prompt.negative_template, prompt.lowercase != 0});
        }
        return all;
    }

    // The number of pictures; where nothing but an image conditions the network, of its latents, else of its seeds or
    // images.
    std::size_t count(const Request& request) const {
        const std::size_t count = request.count();
        const bool free = info_.num_ports == (*info_.guidance_port ? 1u : 0u);
        if (count || (!free && request.image.pixels.empty())) return count;
        if (!request.latents.empty()) return request.latents.size() / row(request);
        return std::max(request.seeds.size(), request.image.count);
    }

    Images generate(const Request& request) const {
        Images images = empty_images(count(request), size_of(request));
        std::uint8_t none = 0;
        std::uint8_t* pixels = images.pixels.empty() ? &none : images.pixels.data();
        call(request,
             [&](const dit_request& from) { return dit_model_generate(get(), &from, pixels, images.pixels.size()); });
        return images;
    }

    // Without decoding: float [count, state_shape].
    std::vector<float> generate_latents(const Request& request) const {
        std::vector<float> latents(count(request) * row(request));
        float none = 0;
        float* numbers = latents.empty() ? &none : latents.data();
        call(request, [&](const dit_request& from) {
            return dit_model_generate_latents(get(), &from, numbers, latents.size());
        });
        return latents;
    }

    // A run that the caller steps.
    Run run(const Request& request) const;

    // Runs every stage at these batch sizes, at a size of the bundle; empty: the pipeline's.
    void warm(const std::vector<std::int64_t>& batches, const std::string& size = {},
              const Cancellation& cancellation = {}) const {
        const std::int64_t none = 0;
        check(dit_model_warm(get(), batches.empty() ? &none : batches.data(), batches.size(),
                             size.empty() ? nullptr : size.c_str(), cancellation.get()));
    }

    // All checks against PyTorch's reference; true where all passed. What on_check throws is thrown once they
    // are done.
    bool verify(const std::function<void(const Check&)>& on_check = {}, const Cancellation& cancellation = {}) const {
        OnCheck call{on_check, nullptr};
        dit_verify_options options = DIT_VERIFY_OPTIONS_INIT;
        if (on_check) options.on_check = &Pipeline::on_check;
        options.user = &call;
        options.cancellation = cancellation.get();
        const dit_status status = dit_model_verify(get(), &options);
        if (call.thrown) std::rethrow_exception(call.thrown);
        if (status != DIT_NOT_VERIFIED) check(status);
        return status == DIT_OK;
    }

    dit_model* get() const { return model_.get(); }

  private:
    friend class Run;

    // The caller's function, and what it threw: nothing may pass through C.
    template <typename Function>
    struct Call {
        const Function& function;
        std::exception_ptr thrown;
    };
    using OnStep = Call<decltype(Request::on_step)>;
    using OnCheck = Call<std::function<void(const Check&)>>;
    using OnProgress = Call<std::function<bool(double)>>;

    static void check(dit_status status) {
        if (status != DIT_OK) throw Error(status, dit_last_message());
    }

    static dit_captions to_c(const Captions& from) {
        dit_captions captions = DIT_CAPTIONS_INIT;
        captions.count = from.count;
        captions.tokens = from.tokens;
        captions.size = from.embeddings.size();
        if (!from.embeddings.empty()) captions.embeddings = from.embeddings.data();
        if (from.mask.empty()) return captions;
        captions.mask = from.mask.data();
        captions.mask_size = from.mask.size();
        return captions;
    }

    // Numbers of a picture's state.
    std::size_t row(const Request& request) const {
        std::size_t numbers = 1;
        for (const std::int64_t size : size_of(request).state) numbers *= static_cast<std::size_t>(size);
        return numbers;
    }

    static Images empty_images(std::size_t count, const Size& size) {
        Images images;
        images.count = count;
        images.height = size.height;
        images.width = size.width;
        images.frames = size.frames;
        images.pixels.resize(count * std::max(images.frames, std::size_t{1}) * images.height * images.width * 3);
        return images;
    }

    static std::vector<dit_array> to_c(const Condition& condition) {
        std::vector<dit_array> arrays;
        for (const auto& entry : condition) {
            const Array& from = entry.second;
            dit_array array = DIT_ARRAY_INIT;
            array.name = entry.first.c_str();
            array.rows = from.rows;
            array.size = from.integers.empty() ? from.floats.size() : from.integers.size();
            if (!from.floats.empty()) array.floats = from.floats.data();
            if (!from.integers.empty()) array.integers = from.integers.data();
            arrays.push_back(array);
        }
        return arrays;
    }

    template <typename Generate>
    void call(const Request& request, const Generate& generate) const {
        OnStep step{request.on_step, nullptr};
        call(request, step, generate);
    }

    // `step` stays where a run that goes on may call it.
    template <typename Generate>
    void call(const Request& request, OnStep& step, const Generate& generate) const {
        dit_request to = DIT_REQUEST_INIT;
        if (!request.labels.empty()) to.labels = request.labels.data();
        to.count = count(request);
        const dit_captions captions = to_c(request.captions), negative = to_c(request.negative);
        if (captions.count) to.captions = &captions;
        if (negative.count) to.negative = &negative;
        const std::vector<dit_array> arrays = to_c(request.condition), away = to_c(request.negative_condition);
        if (!arrays.empty()) to.arrays = arrays.data();
        to.num_arrays = arrays.size();
        if (!away.empty()) to.negative_arrays = away.data();
        to.num_negative_arrays = away.size();
        to.seeds = request.seeds.data();
        to.num_seeds = request.seeds.size();
        if (!request.guidance.empty()) to.guidance = request.guidance.data();
        to.num_guidance = request.guidance.size();
        to.steps = request.steps;
        if (!request.solver.empty()) to.solver = request.solver.c_str();
        if (!request.spacing.empty()) to.spacing = request.spacing.c_str();
        if (!request.size.empty()) to.size = request.size.c_str();
        to.eta = request.eta;
        if (!request.preset.empty()) to.preset = request.preset.c_str();
        if (!request.latents.empty()) to.latents = request.latents.data();
        to.latents_size = request.latents.size();
        std::copy(request.guidance_interval, request.guidance_interval + 2, to.guidance_interval);
        if (!request.guidance_policy.empty()) to.guidance_policy = request.guidance_policy.c_str();
        if (!request.cache.empty()) to.cache = request.cache.c_str();
        to.cache_interval = request.cache_interval;
        to.max_order = request.max_order;
        to.disable_cache_before_step = request.disable_cache_before_step;
        to.disable_cache_after_step = request.disable_cache_after_step;
        to.cache_threshold = request.cache_threshold;
        to.cancellation = request.cancellation.get();
        if (!request.image.pixels.empty()) to.image = request.image.pixels.data();
        to.image_size = request.image.pixels.size();
        to.num_images = request.image.count;
        to.image_height = request.image.height;
        to.image_width = request.image.width;
        to.strength = request.strength;
        if (!request.mask.empty()) to.mask = request.mask.data();
        to.mask_size = request.mask.size();
        if (request.on_step) to.on_step = &Pipeline::on_step;
        to.user = &step;
        const dit_status status = generate(to);
        rethrow(step);
        check(status);
    }

    static void rethrow(OnStep& step) {
        if (const std::exception_ptr thrown = std::exchange(step.thrown, nullptr)) std::rethrow_exception(thrown);
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

    static int on_progress(double done, void* user) {
        OnProgress& call = *static_cast<OnProgress*>(user);
        try {
            return call.function(done);
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

    std::shared_ptr<dit_model> model_;
    dit_info info_ = DIT_INFO_INIT;
};

}  // namespace dit

#endif  // DIT_PIPELINE_HPP
