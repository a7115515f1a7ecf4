#include "models.hpp"

#include <ctime>
#include <nlohmann/json.hpp>

#include "errors.hpp"
#include "sha256.hpp"
#include "verify.hpp"

namespace server {
namespace {

// Refuses bundles whose requests a label cannot state, and those that draw no images.
void require_servable(const dit::Path& folder, const dit::Manifest& manifest) {
    if (!manifest.end()) throw dit::BundleError(dit::text(folder.string(), ": this bundle has no decoder"));
    if (manifest.frames())
        throw dit::BundleError(dit::text(folder.string(), ": this bundle draws videos, and servers serve images"));
    if (manifest.prompt())
        throw dit::BundleError(
            dit::text(folder.string(), ": this bundle takes prompts, and libdit has no tokenizer; take dit-serve"));
    std::vector<std::string> others;
    for (const dit::Port& port : manifest.conditions())
        if (port.name != manifest.guidance.port && !(port.name == dit::LABELS && manifest.classes()))
            others.push_back(port.name);
    if (!others.empty())
        throw dit::BundleError(dit::text(folder.string(), ": this bundle takes arrays (", dit::join(others),
                                         "), and a prompt does not give them"));
}

// Replays PyTorch's reference on this device; refuses a bundle that does not draw the same.
void require_verified(dit::Pipeline& pipe) {
    std::string failure;
    dit::verify(pipe, [&](const dit::Figure& figure) {
        if (!figure.passed() && failure.empty())
            failure =
                dit::text(figure.name(), " is ", figure.value, figure.where.empty() ? "" : " (" + figure.where + ")");
    });
    if (!failure.empty()) throw dit::BundleError(dit::text(pipe.folder.string(), ": verification failed: ", failure));
}

}  // namespace

std::vector<std::pair<std::string, const dit::Manifest*>> Served::sizes() const {
    std::vector<std::pair<std::string, const dit::Manifest*>> sizes;
    const auto add = [&](const dit::Manifest& manifest) {
        const dit::Shape shape = manifest.image_shape();  // (3, H, W)
        sizes.emplace_back(dit::text(shape[2], "x", shape[1]), &manifest);
    };
    add(manifest());
    for (const dit::Manifest& other : manifest().sizes) add(other);
    return sizes;
}

std::shared_ptr<Served> open_bundle(const dit::Path& place, const Opening& opening, bool verified) {
    const dit::Path folder = std::filesystem::canonical(place);  // the link may change while it is opened
    const auto served = std::make_shared<Served>();
    dit::Options options = opening.options;
    const bool is_there = std::filesystem::is_regular_file(folder / dit::MANIFEST);
    served->sha256 = is_there ? dit::sha256(folder / dit::MANIFEST) : "";
    if (!opening.pins.empty() && !dit::contains(opening.pins, served->sha256))
        throw dit::BundleError(dit::text(folder.string(), ": its manifest has the sha256 ",
                                         is_there ? served->sha256 : "of no file", ", which no --pin names"));
    options.manifest_sha256 = served->sha256;  // one that changes until it is read is refused
    served->pipe = std::make_unique<dit::Pipeline>(folder, options);
    require_servable(folder, served->manifest());
    if (opening.places > 1 && !served->pipe->batch_invariant() && !opening.variance)
        throw dit::UsageError(dit::text(folder.string(), ": --batch is ", opening.places,
                                        ", but pictures of this bundle depend on what shares their call; leave it out, "
                                        "or pass --allow-batch-variance too"));
    if (opening.verify || verified) require_verified(*served->pipe);
    dit::Batcher::Settings settings;
    settings.places = opening.places;
    served->batcher = std::make_unique<dit::Batcher>(*served->pipe, settings);
    served->opened = std::time(nullptr);
    return served;
}

std::shared_ptr<Served> Model::look(const Served& current) const {
    const dit::Path file = folder / dit::MANIFEST;
    if (current.batcher->alive() && std::filesystem::is_regular_file(file) && dit::sha256(file) == current.sha256)
        return nullptr;
    return open_bundle(folder, opening_, true);
}

const dit::Manifest& Model::sized(const Body& body) const {
    if (!body.size || *body.size == "auto") return served->manifest();
    std::vector<std::string> known;
    for (const auto& [size, manifest] : served->sizes()) {
        if (size == *body.size) return *manifest;
        known.push_back(size);
    }
    throw Fault{400, dit::text("size must be auto or ", dit::join(known, " or "), " for the model ", name), "size"};
}

std::pair<std::size_t, std::size_t> Model::picture_size(const Body& body) const {
    const dit::Manifest& manifest = sized(body);
    if (!manifest.start())
        throw Fault{501, dit::text("the model ", name, " has no encoder of images, so it edits none")};
    const dit::Shape shape = manifest.picture_shape();  // (3, H, W)
    return {static_cast<std::size_t>(shape[1]), static_cast<std::size_t>(shape[2])};
}

std::vector<dit::Request> Model::requests(const Body& body, const Limits& limits) const {
    const dit::Manifest* const sized = &this->sized(body);
    const dit::Shape shape = sized->image_shape();
    if (shape[1] * shape[2] * body.n > limits.pixels)
        throw Fault{400, dit::text("n images have more than ", limits.pixels, " pixels in all"), "n"};
    dit::Request request;
    try {
        if (served->manifest().classes())
            request.labels = {dit::class_number(served->manifest(), dit::strip(body.prompt))};
    } catch (const dit::UsageError& error) {
        throw Fault{400, dit::one_line(error.what()), "prompt"};
    }
    request.size = sized->size;
    request.count = 1;
    request.steps = body.num_inference_steps.value_or(0);
    if (body.guidance_scale) request.guidance = {static_cast<float>(*body.guidance_scale)};
    request.solver = body.solver.value_or("");
    request.image = body.image;
    request.mask = body.mask;
    request.strength = body.strength;
    try {
        if (body.preset) request = dit::with_preset(*sized, std::move(request), *body.preset);
    } catch (const dit::UsageError& error) {
        throw Fault{400, dit::one_line(error.what()), "preset"};
    }
    const auto listed = static_cast<std::int64_t>(dit::listed(request.spacing).size());
    const std::int64_t steps = request.steps ? request.steps : listed ? listed : sized->process.sampler.steps;
    if (steps > limits.steps)
        throw Fault{400, dit::text("num_inference_steps must be at most ", limits.steps), "num_inference_steps"};
    std::vector<dit::Request> requests;
    for (const std::uint64_t seed : body.seeds()) {
        requests.push_back(request);
        requests.back().seeds = {seed};
    }
    return requests;
}

nlohmann::json Model::describe() const {
    const dit::Manifest& manifest = served->manifest();
    std::vector<std::string> sizes, presets;
    for (const auto& size : served->sizes()) sizes.push_back(size.first);
    for (const auto& preset : manifest.presets) presets.push_back(preset.first);
    return {{"id", name},
            {"object", "model"},
            {"created", served->opened},
            {"owned_by", "dit-export"},
            {"sizes", sizes},
            {"prompt", manifest.classes() ? "class" : "none"},
            {"labels", manifest.labels},
            {"classes", manifest.classes()},
            {"num_inference_steps", manifest.process.sampler.steps},
            {"guidance_scale", manifest.guidance.weight},
            {"solver", manifest.process.sampler.solver},
            {"presets", presets},
            {"batch_invariant", manifest.batch_invariant},
            {"edits", manifest.start() != nullptr},
            {"batch", served->batcher->places()},
            {"sha256", served->sha256}};
}

}  // namespace server
