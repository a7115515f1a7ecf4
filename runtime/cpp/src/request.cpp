#include "request.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "errors.hpp"
#include "images.hpp"
#include "prompts.hpp"
#include "start.hpp"

namespace dit_runtime {
namespace {

[[noreturn]] void refuse_labels(const Manifest& manifest) {
    std::vector<std::string> names;
    for (const Port& port : manifest.conditions()) names.push_back(port.name);
    throw UsageError(text("this bundle takes ", names.empty() ? "no condition" : join(names), ", and no labels"));
}

void check_label(const Manifest& manifest, std::int64_t label) {
    if (label < 0 || label >= manifest.classes())
        throw UsageError(text("label ", label, " is out of range; expected 0 to ", manifest.classes() - 1));
}

std::vector<std::string> prompt_names(const Manifest& manifest) {
    std::vector<std::string> names;
    for (const Port& port : prompt_ports(manifest)) names.push_back(port.name);
    return names;
}

Rows fit_condition(const Manifest& manifest, const Request& request) {
    Arrays arrays = request.condition;
    if (!request.labels.empty()) {
        if (arrays.count(LABELS)) throw UsageError("got both labels and a condition with labels: pass one of them");
        if (!manifest.classes()) refuse_labels(manifest);
        for (const std::int64_t label : request.labels) check_label(manifest, label);
        arrays[LABELS] = {{static_cast<std::int64_t>(request.labels.size())}, {}, request.labels};
    } else if (manifest.classes() && !arrays.count(LABELS)) {
        throw UsageError("no labels; pass at least one class name or number");
    }
    if (manifest.prompt() && !has_prompt(manifest, arrays))
        throw UsageError(text("no prompt; pass its token ids as ", join(prompt_names(manifest))));
    std::vector<Port> ports = filled_ports(manifest, arrays);
    if (const Port* const picture = manifest.picture(); picture && request.image) {
        if (arrays.count(picture->name))
            throw UsageError(text("got both an image and a condition with ", picture->name, ": pass one of them"));
        ports.erase(std::remove_if(ports.begin(), ports.end(), [](const Port& port) { return port.picture; }),
                    ports.end());
    } else if (picture && manifest.start() && !arrays.count(picture->name)) {
        throw UsageError(text("no image for ", picture->name,
                              "; pass one (dit-generate: --image), or a condition with ", picture->name));
    }
    Rows condition = fit(ports, arrays);
    if (condition.rows && request.count && request.count != condition.rows)
        throw UsageError(text("count is ", request.count, ", the condition has ", condition.rows, " rows"));
    if (!condition.rows && request.count) condition.rows = request.count;
    if (!condition.rows) {
        condition.rows = std::max<std::size_t>(1, request.seeds.size());
        for (const auto& pictures : {request.image, request.mask})
            if (pictures && !pictures->shape.empty())
                condition.rows = std::max(condition.rows, static_cast<std::size_t>(pictures->shape[0]));
    }
    return condition;
}

// Refuses pictures of another size, and as many of them as there are not samples.
void require_size(const Pictures& pictures, const char* what, const Shape& each, std::size_t count) {
    const Shape& shape = pictures.shape;
    if (shape.size() != each.size() + 1 || shape[0] < 1 || !std::equal(each.begin(), each.end(), shape.begin() + 1) ||
        pictures.bytes.size() != dit_runtime::count(shape))
        throw UsageError(
            text(what, " has shape ", shown(shape), "; expected ", shown(each), ", or one for each sample"));
    if (shape[0] != 1 && static_cast<std::size_t>(shape[0]) != count)
        throw UsageError(
            text(what, " has ", shape[0], " pictures; expected one, or one for each of ", count, " samples"));
}

// The image and the mask as the encoder and the state take them.
void fit_pictures(const Manifest& manifest, const Request& request, Checked& checked) {
    const std::pair<const char*, bool> beside[] = {{"strength", request.strength.has_value()},
                                                   {"mask", request.mask.has_value()}};
    for (const auto& [name, stated] : beside) {
        if (stated && !request.image) throw UsageError(text("got ", name, " without an image to start from"));
        if (stated && manifest.picture())
            throw UsageError(text("got ", name, ", but this bundle takes the image as ", manifest.picture()->name,
                                  ": leave it out"));
    }
    if (!request.image) return;
    if (!manifest.picture() && request.latents)
        throw UsageError("got both an image and latents to start from: pass one of them");
    const Shape shape = manifest.picture_shape(), &state = manifest.state().shape;
    const std::int64_t height = shape[1], width = shape[2];
    require_size(*request.image, "image", {height, width, 3}, checked.condition.rows);
    checked.image = to_unit(request.image->bytes, request.image->shape);
    if (!request.mask) return;
    require_size(*request.mask, "mask", {height, width}, checked.condition.rows);
    for (std::int64_t row = 0; row < request.mask->shape[0] * height; row += height / state[1])  // a cell's first pixel
        for (std::int64_t column = 0; column < width; column += width / state[2])
            checked.mask.push_back(request.mask->bytes[static_cast<std::size_t>(row * width + column)] >= 128);
}

std::vector<float> guidance(const Manifest& manifest, std::vector<float> numbers, std::size_t count) {
    if (numbers.empty()) numbers = {static_cast<float>(manifest.guidance.weight)};
    if (numbers.size() != 1 && numbers.size() != count)
        throw UsageError(text("guidance has ", numbers.size(), " numbers; expected one, or ", count, ", one a sample"));
    for (const float number : numbers)
        if (!std::isfinite(number)) throw UsageError(text("guidance is ", number, "; expected finite numbers"));
    std::vector<float> weights = numbers.size() == 1 ? std::vector<float>(count, numbers[0]) : numbers;
    if (manifest.guidance.unguided_up_to_one && manifest.guidance.port.empty())
        // As it would be alone: a sample does not depend on its batch.
        for (float& weight : weights) weight = std::max(weight, 1.0f);
    return weights;
}

// True if the negative's rows are needed: not if they cannot change the result.
bool is_guided(const Manifest& manifest, const std::vector<float>& weights) {
    return manifest.mixes_guidance() &&
           !std::all_of(weights.begin(), weights.end(), [](float weight) { return weight == 1; });
}

// The weights as rows of the port that takes them, unless the condition has rows of its own for it.
void embed_guidance(const Manifest& manifest, const Request& request, Checked& checked) {
    const std::string& port = manifest.guidance.port;
    if (port.empty()) return;
    if (!request.negative.empty())
        throw UsageError(text("got a negative, but this bundle takes its guidance as ", port, ", and no negative"));
    const bool own = checked.condition.arrays.count(port) != 0;
    if (own && !request.guidance.empty())
        throw UsageError(text("got both guidance and a condition with ", port, ": pass one of them"));
    if (!own) checked.condition.arrays[port] = {with_rows(checked.condition.rows, {}), checked.weights};
}

// Refuses policies where the step stage has no two predictions to mix.
void require_mixing(const Manifest& manifest, const Request& request) {
    if (manifest.mixes_guidance()) return;
    const std::string& port = manifest.guidance.port;
    const std::string why = port.empty() ? "has no guidance" : "takes its guidance as " + port;
    const auto refuse = [&](const std::string& what) {
        throw UsageError(text(what, ", but this bundle ", why, "; leave it out"));
    };
    if (const auto& interval = request.guidance_interval)
        refuse(text("guidance_interval is (", interval->first, ", ", interval->second, ")"));
    if (!request.guidance_policy.empty()) refuse(text("guidance_policy is '", request.guidance_policy, "'"));
}

Rows fit_negative(const Manifest& manifest, const Request& request, std::size_t count, bool guided) {
    if (!guided && request.negative.empty()) return {};
    if (manifest.prompt() && !has_prompt(manifest, request.negative))
        throw UsageError(text("guidance needs a negative with ", join(prompt_names(manifest)),
                              ", to lead away from; or pass guidance 1"));
    Rows negative = null_condition(filled_ports(manifest, request.negative), manifest.null, request.negative);
    if (negative.rows != 1 && negative.rows != count)
        throw UsageError(
            text("negative has ", negative.rows, " rows; expected one, or one for each of ", count, " samples"));
    return guided ? negative : Rows();
}

}  // namespace

Checked check(const Manifest& manifest, const Request& request) {
    Checked checked;
    checked.condition = fit_condition(manifest, request);
    fit_pictures(manifest, request, checked);
    const std::size_t count = checked.condition.rows, size = count * dit_runtime::count(manifest.state().shape);
    checked.weights = guidance(manifest, request.guidance, count);
    embed_guidance(manifest, request, checked);
    require_mixing(manifest, request);
    const bool guided = is_guided(manifest, checked.weights);
    const Rows negative = fit_negative(manifest, request, count, guided);
    checked.solver = request.solver.empty() ? manifest.process.sampler.solver : request.solver;
    checked.steps = request.steps ? request.steps : static_cast<std::int64_t>(listed(request.spacing).size());
    if (!checked.steps) checked.steps = manifest.process.sampler.steps;
    plan(manifest.process, checked.solver, checked.steps, request.spacing);  // refuses
    if (!checked.image.empty() && !manifest.picture()) checked.first = first_step(checked.steps, request.strength);
    checked.levels = levels(manifest.process, checked.solver, checked.steps, request.spacing, checked.first);
    for (const Level& level : checked.levels) checked.timesteps.push_back(level.time);
    Solver(manifest.process, checked.solver, checked.steps, {}, draw({0}, 1), request.eta, request.spacing);  // refuses
    const std::int64_t each = evaluations(checked.solver);
    checked.groups = plan_guidance(manifest.process, checked.timesteps, each, guided, request.guidance_interval,
                                   request.guidance_policy);
    for (const auto& groups : checked.groups)
        if (groups && *groups != Groups::OWN) checked.negative = negative;
    const auto asked = static_cast<std::int64_t>(checked.timesteps.size());
    make_cache(request.cache, request.cache_settings, asked, each);  // refuses
    if (checked.solver == "ddpm") require_variance(manifest.process.sampler, find(manifest.step().gives, "variance"));
    draw(request.seeds, count);  // refuses another number of seeds
    if (request.latents && (request.latents->size() != size || !all_finite(*request.latents)))
        throw UsageError(text("latents have ", request.latents->size(), " numbers; expected ", size, ", all finite"));
    return checked;
}

// What the request states stays. With it go the preset's fields that mean nothing beside it: settings of another cache,
// times of other steps.
Request with_preset(const Manifest& manifest, Request request, const std::string& name) {
    Preset preset = manifest.preset(name);
    if (!request.cache.empty()) preset.cache_settings.clear();
    if (request.steps && !listed(preset.spacing).empty()) preset.spacing.clear();
    if (!listed(request.spacing).empty()) preset.steps = 0;
    if (!request.steps) request.steps = preset.steps;
    if (request.guidance.empty() && preset.guidance) request.guidance = {static_cast<float>(*preset.guidance)};
    if (request.solver.empty()) request.solver = preset.solver;
    if (request.spacing.empty()) request.spacing = preset.spacing;
    if (request.eta == 0) request.eta = preset.eta;
    if (!request.guidance_interval) request.guidance_interval = preset.guidance_interval;
    if (request.guidance_policy.empty()) request.guidance_policy = preset.guidance_policy;
    if (request.cache.empty()) request.cache = preset.cache;
    request.cache_settings.insert(preset.cache_settings.begin(), preset.cache_settings.end());
    return request;
}

std::int64_t class_number(const Manifest& manifest, const std::string& label) {
    const std::int64_t classes = manifest.classes();
    if (!classes) refuse_labels(manifest);
    const std::string digits = label.substr(label.rfind('-', 0) == 0 ? 1 : 0);
    if (!digits.empty() && digits.find_first_not_of("0123456789") == std::string::npos) {
        const std::int64_t number = digits.size() < 18 ? std::stoll(label) : INT64_MAX;
        check_label(manifest, number);
        return number;
    }
    const std::string wanted = lower(strip(label));
    const auto& labels = manifest.labels;
    for (std::size_t number = 0; number < labels.size(); ++number)  // whole names win over synonyms of others
        if (lower(strip(labels[number])) == wanted) return static_cast<std::int64_t>(number);
    std::vector<std::string> known = labels;
    for (std::size_t number = 0; number < labels.size(); ++number) {
        std::istringstream synonyms(labels[number]);
        for (std::string synonym; std::getline(synonyms, synonym, ',');) {
            if (lower(strip(synonym)) == wanted) return static_cast<std::int64_t>(number);
            known.push_back(strip(synonym));
        }
    }
    const std::string refusal = text("class '", label, "' is not known");
    if (labels.empty()) throw UsageError(text(refusal, ": this bundle has no names, only 0 to ", classes - 1));
    std::vector<std::string> some;
    for (std::size_t number = 0; number < labels.size() && number < 3; ++number)
        some.push_back(labels[number].substr(0, labels[number].find(',')));
    if (labels.size() > 3) some.push_back("…");
    throw UsageError(text(refusal, nearest(label, known), "; the bundle has ", join(some)));
}

}  // namespace dit_runtime
