// The C ABI's pipelines: each call is one on their model.
#include <new>

#include "handle.hpp"

namespace {

// Makes the call on the pipeline's model; refuses where it has none.
template <typename Call>
dit_status on_model(const dit_pipeline* pipe, const Call& call) noexcept {
    if (!pipe) return dit_runtime::fail(DIT_BAD_ARGUMENT, "the pipeline is NULL; make one with dit_new");
    dit_model* const model = pipe->model;
    if (model) return call(model);
    return dit_runtime::fail(DIT_BAD_ARGUMENT, "no bundle is open in this pipeline; call dit_open first");
}

// The pipeline's manifest; NULL without a bundle.
const dit_runtime::Manifest* manifest_of(const dit_pipeline* pipe) {
    const dit_model* const model = dit_get_model(pipe);
    return model ? &model->pipe->manifest : nullptr;
}

}  // namespace

extern "C" {

dit_pipeline* dit_new(void) { return new (std::nothrow) dit_pipeline; }

void dit_free(dit_pipeline* pipe) {
    if (pipe) dit_model_release(pipe->model);
    delete pipe;
}

dit_status dit_open(dit_pipeline* pipe, const char* bundle, const dit_open_options* options) {
    if (!pipe) return dit_runtime::fail(DIT_BAD_ARGUMENT, "the pipeline is NULL; make one with dit_new");
    const char* const again = "this pipeline has a bundle already; take another dit_new";
    if (pipe->model) return dit_runtime::fail(DIT_BAD_ARGUMENT, again);
    dit_model *model = nullptr, *none = nullptr;
    const dit_status status = dit_model_open(bundle, options, &model);
    if (status != DIT_OK || pipe->model.compare_exchange_strong(none, model)) return status;
    dit_model_release(model);  // another thread was first
    return dit_runtime::fail(DIT_BAD_ARGUMENT, again);
}

dit_model* dit_get_model(const dit_pipeline* pipe) { return pipe ? pipe->model.load() : nullptr; }

dit_status dit_get_info(dit_pipeline* pipe, dit_info* info) {
    return on_model(pipe, [&](dit_model* model) { return dit_model_info(model, info); });
}

size_t dit_size_count(const dit_pipeline* pipe) {
    const auto* const manifest = manifest_of(pipe);
    return manifest ? 1 + manifest->sizes.size() : 0;
}

dit_status dit_get_size(dit_pipeline* pipe, size_t index, dit_size* size) {
    return on_model(pipe, [&](dit_model* model) { return dit_model_size(model, index, size); });
}

size_t dit_port_count(const dit_pipeline* pipe) {
    const auto* const manifest = manifest_of(pipe);
    return manifest ? manifest->conditions().size() : 0;
}

dit_status dit_get_port(dit_pipeline* pipe, size_t index, dit_port* port) {
    return on_model(pipe, [&](dit_model* model) { return dit_model_port(model, index, port); });
}

size_t dit_prompt_count(const dit_pipeline* pipe) {
    const auto* const manifest = manifest_of(pipe);
    return manifest ? manifest->prompts.size() : 0;
}

dit_status dit_get_prompt(dit_pipeline* pipe, size_t index, dit_prompt* prompt) {
    return on_model(pipe, [&](dit_model* model) { return dit_model_prompt(model, index, prompt); });
}

const char* dit_preset(const dit_pipeline* pipe, size_t index) { return dit_model_preset(dit_get_model(pipe), index); }

const char* dit_label(const dit_pipeline* pipe, int64_t label) { return dit_model_label(dit_get_model(pipe), label); }

dit_status dit_find_label(dit_pipeline* pipe, const char* name, int64_t* label) {
    return on_model(pipe, [&](dit_model* model) { return dit_model_find_label(model, name, label); });
}

dit_status dit_generate(dit_pipeline* pipe, const dit_request* request, uint8_t* pixels, size_t size) {
    return on_model(pipe, [&](dit_model* model) { return dit_model_generate(model, request, pixels, size); });
}

dit_status dit_generate_latents(dit_pipeline* pipe, const dit_request* request, float* latents, size_t size) {
    return on_model(pipe, [&](dit_model* model) { return dit_model_generate_latents(model, request, latents, size); });
}

dit_status dit_run_new(dit_pipeline* pipe, const dit_request* request, dit_run** run) {
    if (run) *run = nullptr;
    return on_model(pipe, [&](dit_model* model) { return dit_run_begin(model, request, run); });
}

dit_status dit_verify(dit_pipeline* pipe, dit_on_check on_check, void* user) {
    dit_verify_options options = DIT_VERIFY_OPTIONS_INIT;
    options.on_check = on_check;
    options.user = user;
    return on_model(pipe, [&](dit_model* model) { return dit_model_verify(model, &options); });
}

const char* dit_message(const dit_pipeline* pipe) {
    return pipe ? dit_last_message() : "the pipeline is NULL; make one with dit_new";
}

}  // extern "C"
