#include "request.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "errors.hpp"

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
    Rows condition = fit(manifest, arrays);
    if (condition.rows && request.count && request.count != condition.rows)
        throw UsageError(text("count is ", request.count, ", the condition has ", condition.rows, " rows"));
    if (!condition.rows)
        condition.rows = std::max<std::size_t>(1, request.count ? request.count : request.seeds.size());
    return condition;
}

std::vector<float> guidance(const Manifest& manifest, const std::vector<float>& numbers, std::size_t count) {
    if (numbers.size() != 1 && numbers.size() != count)
        throw UsageError(text("guidance has ", numbers.size(), " numbers; expected one, or ", count, ", one a sample"));
    for (const float number : numbers)
        if (!std::isfinite(number)) throw UsageError(text("guidance is ", number, "; expected finite numbers"));
    std::vector<float> weights = numbers.size() == 1 ? std::vector<float>(count, numbers[0]) : numbers;
    if (manifest.unguided_up_to_one)
        // As it would be alone: a sample does not depend on its batch.
        for (float& weight : weights) weight = std::max(weight, 1.0f);
    return weights;
}

// True if the negative's rows are needed: not if they cannot change the result.
bool is_guided(const Manifest& manifest, const std::vector<float>& weights) {
    return manifest.mixes_guidance() &&
           !std::all_of(weights.begin(), weights.end(), [](float weight) { return weight == 1; });
}

Rows fit_negative(const Manifest& manifest, const Request& request, std::size_t count, bool guided) {
    if (!guided && request.negative.empty()) return {};
    Rows negative = null_condition(manifest, request.negative);
    if (negative.rows != 1 && negative.rows != count)
        throw UsageError(
            text("negative has ", negative.rows, " rows; expected one, or one for each of ", count, " samples"));
    return guided ? negative : Rows();
}

}  // namespace

Checked check(const Manifest& manifest, const Request& request) {
    Checked checked;
    checked.condition = fit_condition(manifest, request);
    const std::size_t count = checked.condition.rows, size = count * dit_runtime::count(manifest.state().shape);
    checked.weights = guidance(manifest, request.guidance, count);
    checked.negative = fit_negative(manifest, request, count, is_guided(manifest, checked.weights));
    checked.solver = request.solver.empty() ? manifest.process.sampler.solver : request.solver;
    checked.timesteps = plan(manifest.process, checked.solver, request.steps, request.spacing);
    Solver(manifest.process, checked.solver, request.steps, {}, draw({0}, 1), request.eta, request.spacing);  // refuses
    if (checked.solver == "ddpm") require_variance(manifest.process.sampler, find(manifest.step().gives, "variance"));
    draw(request.seeds, count);  // refuses another number of seeds
    if (request.latents && (request.latents->size() != size || !all_finite(*request.latents)))
        throw UsageError(text("latents have ", request.latents->size(), " numbers; expected ", size, ", all finite"));
    return checked;
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
    throw UsageError(
        text("class '", label, "' is not known",
             labels.empty() ? text(": this bundle has no names, only 0 to ", classes - 1) : nearest(label, known)));
}

}  // namespace dit_runtime
