// Requests of any fields, through the C ABI, on each sound manifest of the corpus. Arrays are as long as they say.
#include <fuzzer/FuzzedDataProvider.h>
#include <unistd.h>

#include <cstdlib>
#include <deque>

#include "bundles.hpp"
#include "dit/dit.h"

namespace {

constexpr int STEPS = 3;  // of a run; then it is stopped

struct Free {
    void operator()(dit_pipeline* pipe) const { dit_free(pipe); }
};

dit_pipeline* opened(std::size_t index) {
    static std::vector<std::unique_ptr<dit_pipeline, Free>> pipes(fuzzed::bundles().size());
    auto& pipe = pipes[index];
    if (!pipe) {
        pipe.reset(dit_new());
        if (dit_open(pipe.get(), fuzzed::bundles()[index]->folder.c_str(), nullptr) != DIT_OK) std::abort();
    }
    return pipe.get();
}

// What a request points to, each in memory of its own size.
class Owned {
  public:
    explicit Owned(FuzzedDataProvider& data) : data_(data) {}

    template <typename T, typename Make>
    const T* array(std::size_t size, const Make& make) {
        auto bytes = std::make_unique<unsigned char[]>(size * sizeof(T));
        T* const values = reinterpret_cast<T*>(bytes.get());
        for (std::size_t at = 0; at < size; ++at) values[at] = make();
        arrays_.push_back(std::move(bytes));
        return values;
    }

    // A word that is known, or any.
    const char* word(const std::vector<const char*>& known) {
        const auto index = data_.ConsumeIntegralInRange<std::size_t>(0, known.size() + 1);
        if (index == known.size()) return nullptr;
        if (index < known.size()) return known[index];
        words_.push_back(data_.ConsumeRandomLengthString(40));
        return words_.back().c_str();
    }

    const float* floats(std::size_t size) {
        return array<float>(size,
                            [&] { return data_.PickValueInArray({0.5f, 1.0f, 0.0f, -3.0f, 1e38f, NAN, INFINITY}); });
    }

    const int64_t* integers(std::size_t size) {
        return array<int64_t>(size,
                              [&] { return data_.PickValueInArray<int64_t>({0, 1, 2, -1, 5, INT64_MAX, INT64_MIN}); });
    }

    std::size_t size() { return data_.ConsumeIntegralInRange<std::size_t>(0, 3); }

  private:
    FuzzedDataProvider& data_;
    std::vector<std::unique_ptr<unsigned char[]>> arrays_;
    std::deque<std::string> words_;
};

const dit_array* arrays(FuzzedDataProvider& data, Owned& owned, const fuzzed::dit::Manifest& manifest,
                        std::size_t count) {
    std::vector<const char*> names;
    for (const auto& port : manifest.ports) names.push_back(port.name.c_str());
    for (const auto& prompt : manifest.prompts) names.push_back(prompt.ids.c_str());
    return owned.array<dit_array>(count, [&] {
        dit_array array = DIT_ARRAY_INIT;
        array.name = owned.word(names);
        array.rows = owned.size();
        const auto* const port = array.name ? manifest.port(array.name) : nullptr;
        array.size = array.rows * (data.ConsumeBool() && port ? fuzzed::dit::count(port->shape) : owned.size());
        if (data.ConsumeBool())
            array.floats = owned.floats(array.size);
        else
            array.integers = owned.integers(array.size);
        return array;
    });
}

int stop(int step, int, const double*, std::size_t, void*) { return step >= STEPS; }

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* bytes, std::size_t length) {
    FuzzedDataProvider data(bytes, length);
    Owned owned(data);
    const auto index = data.ConsumeIntegralInRange<std::size_t>(0, fuzzed::bundles().size() - 1);
    dit_pipeline* const pipe = opened(index);
    const fuzzed::dit::Manifest& manifest = fuzzed::bundles()[index]->manifest;
    const auto number = [&] {
        return data.PickValueInArray(
            {0.0, 1.0, 0.5, -1.0, 1e300, static_cast<double>(NAN), static_cast<double>(INFINITY)});
    };
    const auto integer = [&] { return data.PickValueInArray({DIT_DEFAULT, 0, 1, 2, 3, -1, INT32_MAX}); };
    dit_request request = DIT_REQUEST_INIT;
    if (data.ConsumeBool()) request.labels = owned.integers(request.count = owned.size());
    if (data.ConsumeBool()) request.count = owned.size() * (request.labels == nullptr);
    request.num_seeds = owned.size();
    request.seeds = owned.array<uint64_t>(request.num_seeds, [&] { return data.ConsumeIntegral<uint64_t>(); });
    request.num_guidance = owned.size();
    request.guidance = owned.floats(request.num_guidance);
    request.steps = data.PickValueInArray({0, 1, 2, 5, 1000, -1, INT32_MAX});
    request.solver =
        owned.word({"ddpm", "ddim", "dpm++", "dpm++3", "euler", "heun", "sde", "scm", "sde-dpm++", "unipc3", "deis3"});
    request.spacing = owned.word({"stride", "respaced", "trailing", "linspace", "karras", "exponential", "beta",
                                  "discrete", "integer", "999, 640, 300", "1, 0.5, 1e-300"});
    request.eta = number();
    if (data.ConsumeBool()) {
        const std::size_t each = fuzzed::dit::count(manifest.state().shape);
        request.latents_size = std::max<std::size_t>(1, owned.size()) * each;
        request.latents = owned.floats(request.latents_size);
    }
    request.on_step = stop;
    request.num_arrays = owned.size();
    request.arrays = arrays(data, owned, manifest, request.num_arrays);
    request.num_negative_arrays = owned.size();
    request.negative_arrays = arrays(data, owned, manifest, request.num_negative_arrays);
    for (double& bound : request.guidance_interval) bound = number();
    request.guidance_policy = owned.word({"constant", "rescale guidance_rescale=0.5", "zero_star zero_init_steps=1",
                                          "apg momentum=-0.5 norm_threshold=1e300"});
    request.cache = owned.word({"taylorseer", "easycache"});
    request.cache_interval = integer();
    request.max_order = integer();
    request.disable_cache_before_step = integer();
    request.disable_cache_after_step = integer();
    request.cache_threshold = number();
    request.preset = owned.word({"fast"});
    request.size = owned.word({"32", "32x64"});
    if (data.ConsumeBool()) request.struct_size = data.ConsumeIntegralInRange<std::size_t>(0, sizeof request);
    if (data.ConsumeBool()) {
        constexpr std::size_t side = 32;
        request.image_size = data.PickValueInArray({std::size_t{0}, std::size_t{1}, side * side * 3, side * side * 6});
        request.image = owned.array<uint8_t>(request.image_size, [] { return uint8_t{7}; });
        request.num_images = owned.size();
        request.image_height = data.PickValueInArray({std::size_t{0}, side, 2 * side, SIZE_MAX});
        request.image_width = data.PickValueInArray({std::size_t{0}, side, 2 * side, SIZE_MAX});
        if (data.ConsumeBool()) request.strength = number();
        if (data.ConsumeBool()) {
            request.mask_size = data.PickValueInArray({std::size_t{0}, std::size_t{1}, side * side, side * side * 2});
            request.mask = owned.array<uint8_t>(request.mask_size, [] { return uint8_t{200}; });
        }
    }
    const std::size_t room = 8 * fuzzed::dit::count(manifest.state().shape);
    const auto numbers = std::make_unique<float[]>(room);
    dit_generate_latents(pipe, &request, numbers.get(), room);
    for (const char letter : std::string(dit_message(pipe)))
        if (static_cast<unsigned char>(letter) < 0x20) std::abort();
    dit_run* run = nullptr;
    int more = 1;
    dit_status status = dit_run_new(pipe, &request, &run);
    for (int step = 0; step < STEPS && status == DIT_OK && more; ++step) status = dit_run_step(run, &more);
    if (status == DIT_INTERNAL) std::abort();
    dit_run_free(run);
    return 0;
}
