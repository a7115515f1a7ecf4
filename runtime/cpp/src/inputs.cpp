// What a run is asked for, checked: labels, guidance, captions. In Python a part of pipeline.py.
#include <algorithm>
#include <sstream>

#include "errors.hpp"
#include "pipeline.hpp"

namespace dit_runtime {

std::int64_t Pipeline::label_id(const std::string& label) const {
    const std::string digits = label.substr(label.rfind('-', 0) == 0 ? 1 : 0);
    if (!digits.empty() && digits.find_first_not_of("0123456789") == std::string::npos) {
        const std::int64_t number = digits.size() < 18 ? std::stoll(label) : INT64_MAX;
        check_label(number);
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
    throw UsageError(text("class '", label, "' is not known",
                          labels.empty() ? text(": this bundle has no names, only 0 to ", manifest.num_classes - 1)
                                         : nearest(label, known)));
}

void Pipeline::check_labels(const Request& request) const {
    const char* const other = manifest.caption_shape().empty() ? "" : "; or captions";
    if (request.labels.empty()) throw UsageError(text("no labels; pass at least one class name or number", other));
    if (request.negative) throw UsageError("negative captions without captions; pass both, or labels alone");
    for (const std::int64_t label : request.labels) check_label(label);
}

void Pipeline::check_label(std::int64_t label) const {
    if (label < 0 || label >= manifest.num_classes)
        throw UsageError(text("label ", label, " is out of range; expected 0 to ", manifest.num_classes - 1));
}

bool Pipeline::is_guided(const std::vector<float>& weights) const {
    return !std::all_of(weights.begin(), weights.end(),
                        [this](float weight) { return manifest.unguided_up_to_one ? weight <= 1 : weight == 1; });
}

std::vector<float> Pipeline::guidance(const std::vector<float>& given, std::size_t count) const {
    if (given.size() != 1 && given.size() != count)
        throw UsageError(text("guidance has ", given.size(), " numbers; expected one, or ", count, ", one a label"));
    if (!all_finite(given)) throw UsageError("guidance holds what is no finite number");
    std::vector<float> weights = given.size() == 1 ? std::vector<float>(count, given[0]) : given;
    if (manifest.unguided_up_to_one)
        // As it would be alone: a sample does not depend on its batch.
        for (float& weight : weights) weight = std::max(weight, 1.0f);
    return weights;
}

Captions Pipeline::fitting(const Given& captions, const std::string& what) const {
    const Shape shape = manifest.caption_shape();
    if (shape.empty())
        throw UsageError(text("this bundle takes labels, 0 to ", manifest.num_classes - 1, ", and no ", what));
    return dit_runtime::fitting(captions, shape, what);
}

}  // namespace dit_runtime
