// The calls of the C ABI that describe a bundle: what it draws, what it takes, its classes.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "errors.hpp"
#include "handle.hpp"
#include "request.hpp"
#include "structs.hpp"

namespace dit = dit_runtime;

namespace {

const dit::Manifest& manifest_of(const dit_model* model) {
    dit::require(model, "model");
    return model->pipe->manifest;
}

// What a manifest's pictures are, for a dit_info or dit_size.
template <typename Struct>
void fill_images(const dit::Manifest& manifest, Struct& to) {
    const dit::Shape image = manifest.image_shape();  // (3, H, W) or (3, F, H, W)
    to.frames = manifest.frames();
    for (std::size_t axis = 0; axis < 2; ++axis)
        to.image_shape[axis] = image.empty() ? 0 : image.end()[static_cast<std::ptrdiff_t>(axis) - 2];
    to.image_shape[2] = image.empty() ? 0 : image[0];
}

}  // namespace

extern "C" {

dit_status dit_model_info(const dit_model* model, dit_info* info) {
    return dit::attempt([&] {
        dit_info filled = dit::known(info, dit_info DIT_INFO_INIT, "dit_info");
        const dit::Manifest& manifest = manifest_of(model);
        const dit::Shape& state = manifest.state().shape;
        filled.num_classes = manifest.classes();
        filled.has_labels = !manifest.labels.empty();
        for (std::size_t axis = 0; axis < 3; ++axis) filled.latent_shape[axis] = state.size() == 3 ? state[axis] : 0;
        fill_images(manifest, filled);
        const dit::Port* const captions = manifest.port("captions");
        for (std::size_t axis = 0; axis < 2; ++axis)
            filled.caption_shape[axis] = captions && captions->shape.size() == 2 ? captions->shape[axis] : 0;
        filled.state_rank = static_cast<int>(state.size());
        std::copy(state.begin(), state.end(), filled.state_shape);
        filled.max_batch = manifest.step().max_batch;
        filled.train_steps = manifest.process.train_steps;
        filled.model = manifest.model_name.c_str();
        filled.solver = manifest.process.sampler.solver.c_str();
        filled.backend = model->backend.c_str();
        filled.precision = manifest.step().precision.c_str();
        filled.note = model->note.c_str();
        filled.batch_invariant = model->pipe->batch_invariant();
        filled.steps = manifest.process.sampler.steps;
        filled.guidance = manifest.guidance.weight;
        filled.guidance_port = manifest.guidance.port.c_str();
        filled.num_sizes = 1 + manifest.sizes.size();
        filled.num_ports = manifest.conditions().size();
        filled.num_prompts = manifest.prompts.size();
        filled.num_presets = manifest.presets.size();
        std::memcpy(info, &filled, info->struct_size);
    });
}

dit_status dit_model_port(const dit_model* model, size_t index, dit_port* port) {
    return dit::attempt([&] {
        dit_port filled = dit::known(port, dit_port DIT_PORT_INIT, "dit_port");
        const dit::Manifest& manifest = manifest_of(model);
        const std::size_t count = manifest.conditions().size();
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

dit_status dit_model_size(const dit_model* model, size_t index, dit_size* size) {
    return dit::attempt([&] {
        dit_size filled = dit::known(size, dit_size DIT_SIZE_INIT, "dit_size");
        const dit::Manifest& first = manifest_of(model);
        const std::size_t count = 1 + first.sizes.size();
        if (index >= count) throw dit::UsageError(dit::text("size ", index, " is not there; this bundle has ", count));
        const dit::Manifest& from = index ? first.sizes[index - 1] : first;
        const dit::Shape& state = from.state().shape;
        filled.name = from.size.c_str();
        filled.state_rank = static_cast<int>(state.size());
        std::copy(state.begin(), state.end(), filled.state_shape);
        fill_images(from, filled);
        std::memcpy(size, &filled, size->struct_size);
    });
}

dit_status dit_model_prompt(const dit_model* model, size_t index, dit_prompt* prompt) {
    return dit::attempt([&] {
        dit_prompt filled = dit::known(prompt, dit_prompt DIT_PROMPT_INIT, "dit_prompt");
        const std::vector<dit::Prompt>& prompts = manifest_of(model).prompts;
        if (index >= prompts.size())
            throw dit::UsageError(dit::text("prompt ", index, " is not there; this bundle has ", prompts.size()));
        const dit::Prompt& from = prompts[index];
        filled.ids = from.ids.c_str();
        filled.mask = from.mask.c_str();
        filled.tokens = from.tokens;
        filled.size = from.size;
        filled.tokenizer = from.tokenizer.c_str();
        filled.prompt_template = from.prompt_template.c_str();
        filled.negative_template =
            (from.negative_template.empty() ? from.prompt_template : from.negative_template).c_str();
        filled.lowercase = from.lowercase;
        std::memcpy(prompt, &filled, prompt->struct_size);
    });
}

const char* dit_model_preset(const dit_model* model, size_t index) {
    if (!model || index >= model->pipe->manifest.presets.size()) return nullptr;
    return std::next(model->pipe->manifest.presets.begin(), static_cast<std::ptrdiff_t>(index))->first.c_str();
}

const char* dit_model_label(const dit_model* model, int64_t label) {
    if (!model) return nullptr;
    const auto& labels = model->pipe->manifest.labels;
    if (label < 0 || static_cast<std::uint64_t>(label) >= labels.size()) return nullptr;
    return labels[static_cast<std::size_t>(label)].c_str();
}

dit_status dit_model_find_label(const dit_model* model, const char* name, int64_t* label) {
    return dit::attempt([&] {
        dit::require(name, "name");
        dit::require(label, "label");
        *label = dit::class_number(manifest_of(model), name);
    });
}

}  // extern "C"
