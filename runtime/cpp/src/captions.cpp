#include "captions.hpp"

#include <algorithm>

#include "errors.hpp"
#include "noise.hpp"

namespace dit_runtime {
namespace {

// The rows of one part for the samples; one row for all of them where there is but one.
void append(std::vector<float>& to, const std::vector<float>& part, std::size_t count, std::size_t first,
            std::size_t last) {
    const std::size_t row = part.size() / count;
    for (std::size_t sample = first; sample < last; ++sample) {
        const auto from = part.begin() + static_cast<std::ptrdiff_t>(count == 1 ? 0 : sample * row);
        to.insert(to.end(), from, from + static_cast<std::ptrdiff_t>(row));
    }
}

}  // namespace

Captions examples(const std::vector<std::int64_t>& numbers, const Shape& shape) {
    const std::int64_t tokens = shape[0], channels = shape[1];
    Captions made{numbers.size(), {}, {}};
    for (const std::int64_t number : numbers) {
        const auto embeddings =
            Noise(static_cast<std::uint64_t>(number)).normal(static_cast<std::size_t>(tokens * channels));
        made.embeddings.insert(made.embeddings.end(), embeddings.begin(), embeddings.end());
        const std::int64_t length = tokens - number * tokens / (EXAMPLES + 1);
        for (std::int64_t token = 0; token < tokens; ++token) made.mask.push_back(token < length ? 1.0f : 0.0f);
    }
    return made;
}

const Context& Contexts::operator()(std::size_t first, std::size_t last) {
    if (!own_.count || (stacked_.count && first == first_ && last == last_)) return stacked_;
    first_ = first, last_ = last;
    stacked_ = {last - first, {}, {}};
    stacked_.vectors.reserve(own_.vectors.size() / own_.count * (last - first) * (null_.count ? 2 : 1));
    for (const Context* group : {&own_, &null_}) {
        if (!group->count) continue;
        append(stacked_.vectors, group->vectors, group->count, first, last);
        append(stacked_.mask, group->mask, group->count, first, last);
    }
    return stacked_;
}

Captions fitting(const Given& captions, const Shape& shape, const std::string& what) {
    const std::size_t count = captions.count, given = captions.tokens;
    const std::size_t tokens = static_cast<std::size_t>(shape[0]), channels = static_cast<std::size_t>(shape[1]);
    if (!count || !given || given > tokens)
        throw UsageError(text(what, " are ", count, " of ", given, " tokens; expected one or more, of up to ", tokens));
    Captions filled{count, std::vector<float>(count * tokens * channels), std::vector<float>(count * tokens)};
    for (std::size_t index = 0; index < count; ++index) {
        const float* embeddings = captions.embeddings + index * given * channels;
        if (!all_finite(embeddings, given * channels)) throw UsageError(what + " hold values that are not finite");
        std::copy_n(embeddings, given * channels, &filled.embeddings[index * tokens * channels]);
        float* mask = &filled.mask[index * tokens];
        if (captions.mask)
            std::copy_n(captions.mask + index * given, given, mask);
        else
            std::fill_n(mask, given, 1.0f);
        if (!std::all_of(mask, mask + given, [](float value) { return value == 0 || value == 1; }) ||
            std::none_of(mask, mask + given, [](float value) { return value == 1; }))
            throw UsageError(what + ": the mask of caption " + std::to_string(index) +
                             " is not of 0 and 1; expected that, with a 1 in every row");
    }
    return filled;
}

}  // namespace dit_runtime
