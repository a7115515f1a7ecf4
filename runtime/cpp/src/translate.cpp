#include "translate.hpp"

#include <algorithm>

#include "errors.hpp"
#include "handle.hpp"
#include "prompts.hpp"
#include "structs.hpp"

namespace dit_runtime {
namespace {

// The caller's structs follow each other; the first one names the size of each.
dit_array array_at(const dit_array* arrays, std::size_t index) {
    const std::size_t stride = known(arrays, dit_array DIT_ARRAY_INIT, "dit_array").struct_size;
    const auto* const place = reinterpret_cast<const unsigned char*>(arrays) + index * stride;
    return known(reinterpret_cast<const dit_array*>(place), dit_array DIT_ARRAY_INIT, "dit_array");
}

// Numbers as rows of a port: its shape, of fewer tokens where there are fewer numbers.
Tensor rows_of(const Manifest& manifest, const dit_array& from) {
    std::vector<Port> ports = prompt_ports(manifest);
    for (Port& port : manifest.conditions()) ports.push_back(std::move(port));
    const auto named = [&](const Port& port) { return port.name == from.name; };
    const auto port = std::find_if(ports.begin(), ports.end(), named);
    const bool known = port != ports.end();  // else it is refused by name
    if (!from.floats == !from.integers)
        throw UsageError(text(from.name, ": expected either floats or integers, the other NULL"));
    if (!from.rows || !from.size || from.size % from.rows)
        throw UsageError(text(from.name, " has ", from.size, " numbers in ", from.rows,
                              " rows; expected a multiple of its rows, one or more"));
    Shape shape = known ? port->shape : Shape();
    const std::size_t row = from.size / from.rows;
    if (row != count(shape)) {
        const std::size_t token = shape.empty() ? 0 : count({shape.begin() + 1, shape.end()});
        if (known && (!token || row % token))
            throw UsageError(text(from.name, " has ", row, " numbers a row; expected ", shown(shape)));
        if (token) shape[0] = static_cast<std::int64_t>(row / token);
    }
    Tensor tensor{with_rows(from.rows, shape)};
    if (from.floats) tensor.floats.assign(from.floats, from.floats + from.size);
    if (from.integers) tensor.integers.assign(from.integers, from.integers + from.size);
    return tensor;
}

void add(const Manifest& manifest, const dit_array* arrays, std::size_t count, const char* what, Arrays& to) {
    if (count) require(arrays, what);
    for (std::size_t index = 0; index < count; ++index) {
        const dit_array from = array_at(arrays, index);
        require(from.name, "dit_array.name");
        if (to.count(from.name)) throw UsageError(text(what, ": ", from.name, " is there twice"));
        to[from.name] = rows_of(manifest, from);
    }
}

// Captions as the ports that they are.
void add(const Manifest& manifest, const dit_captions* captions, const char* what, Arrays& to) {
    if (!captions) return;
    const dit_captions from = known(captions, dit_captions DIT_CAPTIONS_INIT, "dit_captions");
    const Port* const port = manifest.port("captions");
    if (!port || port->shape.size() != 2)
        throw UsageError(
            text("this bundle takes no ", what,
                 manifest.classes() ? text("; it takes labels, 0 to ", manifest.classes() - 1) : std::string()));
    const auto most = static_cast<std::size_t>(port->shape[0]), channels = static_cast<std::size_t>(port->shape[1]);
    if (!from.count || !from.tokens || from.tokens > most)
        throw UsageError(
            text(what, " are ", from.count, " of ", from.tokens, " tokens; expected one or more, of up to ", most));
    require(from.embeddings, "embeddings");
    if (from.count > SIZE_MAX / (from.tokens * channels * sizeof(float)))
        throw UsageError(text(what, " are ", from.count, "; no memory holds that many"));
    const std::size_t numbers = from.count * from.tokens, size = numbers * channels;
    if (from.size != size) throw UsageError(text(what, ": size is ", from.size, "; expected ", size, " embeddings"));
    if (from.mask_size != (from.mask ? numbers : 0))
        throw UsageError(text(what, ": mask_size is ", from.mask_size, "; expected ", from.mask ? numbers : 0));
    const auto rows = static_cast<std::int64_t>(from.count), tokens = static_cast<std::int64_t>(from.tokens);
    to["captions"] = {{rows, tokens, port->shape[1]}, {from.embeddings, from.embeddings + size}};
    if (from.mask) to["mask"] = {{rows, tokens}, {from.mask, from.mask + numbers}};
}

// Refuses a length that is not that of so many pictures of the image's size, with so many numbers a place.
void require_bytes(const char* what, std::size_t size, std::size_t count, const dit_request& from,
                   std::size_t channels) {
    std::size_t bytes = count;
    for (const std::size_t factor : {from.image_height, from.image_width, channels}) {
        if (factor && bytes > static_cast<std::size_t>(INT64_MAX) / factor)
            throw UsageError(text(what, " is ", count, " of ", from.image_height, " x ", from.image_width,
                                  "; no memory holds that many"));
        bytes *= factor;
    }
    if (!bytes || size != bytes)
        throw UsageError(text(what, " has ", size, " bytes; expected ", bytes, ", for ", count, " of ",
                              from.image_height, " x ", from.image_width));
}

Pictures image_of(const dit_request& from) {
    require_bytes("image", from.image_size, from.num_images, from, 3);
    const Shape row = {static_cast<std::int64_t>(from.image_height), static_cast<std::int64_t>(from.image_width), 3};
    return {with_rows(from.num_images, row), {from.image, from.image + from.image_size}};
}

// Of the image's size; one alone is as long as that of one picture.
Pictures mask_of(const dit_request& from) {
    const Shape row = {static_cast<std::int64_t>(from.image_height), static_cast<std::int64_t>(from.image_width)};
    const std::size_t masks = std::max<std::size_t>(1, from.mask_size / count(row));
    require_bytes("mask", from.mask_size, masks, from, 1);
    return {with_rows(masks, row), {from.mask, from.mask + from.mask_size}};
}

}  // namespace

dit_request counted(const dit_request* from) {
    dit_request request = known(from, dit_request DIT_REQUEST_INIT, "dit_request");
    if (request.captions && request.labels) throw UsageError("got both labels and captions: pass one of them");
    if (request.labels) return request;  // as many as count says
    std::size_t count = 0;
    if (request.captions) count = known(request.captions, dit_captions DIT_CAPTIONS_INIT, "dit_captions").count;
    if (!request.captions && request.num_arrays) {
        require(request.arrays, "arrays");
        count = array_at(request.arrays, 0).rows;
    }
    if (!count && !request.captions) return request;
    if (request.count && request.count != count)
        throw UsageError(
            text("count is ", request.count, ", of ", request.captions ? "captions " : "rows of arrays ", count));
    request.count = count;
    return request;
}

Request translate(const Manifest& manifest, const dit_request* original) {
    const dit_request from = counted(original);
    Request request;
    add(manifest, from.captions, "captions", request.condition);
    add(manifest, from.negative, "negative captions", request.negative);
    add(manifest, from.arrays, from.num_arrays, "arrays", request.condition);
    add(manifest, from.negative_arrays, from.num_negative_arrays, "negative_arrays", request.negative);
    if (from.image) request.image = image_of(from);
    if (from.image_size) require(from.image, "image");
    if (from.strength != DIT_DEFAULT) request.strength = from.strength;
    if (from.mask_size) require(from.mask, "mask");
    if (from.mask) request.mask = from.image ? mask_of(from) : Pictures();  // which is refused
    // Nothing but guidance and the image conditions the network.
    const std::vector<Port> ports = filled_ports(manifest, {});
    const bool free =
        std::all_of(ports.begin(), ports.end(), [&](const Port& port) { return port.picture && request.image; });
    const bool others = !request.condition.empty() || free;
    if (from.count && !others && !from.image) require(from.labels, "labels");
    if (!from.count && free)
        throw UsageError("count is 0; expected how many pictures, for nothing conditions this network");
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
    if (from.size) request.size = from.size;
    if (from.guidance_interval[0] != 0 || from.guidance_interval[1] != 1)
        request.guidance_interval.emplace(from.guidance_interval[0], from.guidance_interval[1]);
    if (from.guidance_policy) request.guidance_policy = from.guidance_policy;
    if (from.cache) request.cache = from.cache;
    const std::pair<const char*, int> settings[] = {{"cache_interval", from.cache_interval},
                                                    {"max_order", from.max_order},
                                                    {"disable_cache_before_step", from.disable_cache_before_step},
                                                    {"disable_cache_after_step", from.disable_cache_after_step}};
    for (const auto& [name, value] : settings)
        if (value != DIT_DEFAULT) request.cache_settings[name] = value;
    if (!(from.cache_threshold < 0)) request.cache_settings["cache_threshold"] = from.cache_threshold;
    if (from.latents_size) require(from.latents, "latents");
    if (from.latents) {
        const std::size_t size = from.count * count(manifest.state().shape);
        if (from.latents_size != size)
            throw UsageError(text("latents have ", from.latents_size, " numbers; expected ", size, ", all finite"));
        request.latents.emplace(from.latents, from.latents + size);
    }
    if (from.cancellation) request.cancellation = from.cancellation->shared;
    if (from.on_step)
        request.on_step = [call = from.on_step, user = from.user](int step, int steps, const Array& latents) {
            return call(step, steps, latents.data(), latents.size(), user) != 0;
        };
    return from.preset ? with_preset(manifest, std::move(request), from.preset) : request;
}

}  // namespace dit_runtime
