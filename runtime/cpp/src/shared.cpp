#include "shared.hpp"

#include <algorithm>

#include "sha256.hpp"

namespace dit_runtime {
namespace {

std::string key_of(const Stage& stage, const std::vector<Input>& inputs, std::size_t rows, std::size_t row) {
    Sha256 sum;
    const auto update = [&](const void* bytes, std::size_t size) {
        sum.update(static_cast<const unsigned char*>(bytes), size);
    };
    update(stage.name.data(), stage.name.size());
    for (const Input& input : inputs) {
        const std::size_t size = input.bytes() / rows;
        update(static_cast<const unsigned char*>(input.data) + row * size, size);
    }
    return sum.hex();
}

// Some rows of the inputs.
std::vector<Input> take(const std::vector<Input>& inputs, std::size_t rows, const std::vector<std::size_t>& some,
                        std::vector<std::vector<unsigned char>>& bytes) {
    std::vector<Input> taken;
    for (const Input& input : inputs) {
        const std::size_t size = input.bytes() / rows;
        std::vector<unsigned char>& own = bytes.emplace_back();
        for (const std::size_t row : some) {
            const auto* const first = static_cast<const unsigned char*>(input.data) + row * size;
            own.insert(own.end(), first, first + size);
        }
        Input part = input;
        part.shape[0] = static_cast<std::int64_t>(some.size());
        part.data = own.data();
        part.version = 0;
        taken.push_back(std::move(part));
    }
    return taken;
}

}  // namespace

std::map<std::string, std::vector<SharedRow>> SharedMemo::operator()(const Stage& stage,
                                                                     const std::vector<Input>& inputs,
                                                                     std::size_t rows) {
    std::vector<std::string> keys, missing;
    std::vector<std::size_t> first;  // the row of each that is missing
    for (std::size_t row = 0; row < rows; ++row) {
        keys.push_back(key_of(stage, inputs, rows, row));
        const auto place = places_.find(keys.back());
        if (place != places_.end())
            rows_.splice(rows_.end(), rows_, place->second);
        else if (std::find(missing.begin(), missing.end(), keys.back()) == missing.end())
            missing.push_back(keys.back()), first.push_back(row);
    }
    misses += missing.size();
    hits += rows - missing.size();
    if (!missing.empty()) {
        std::vector<std::vector<unsigned char>> bytes;
        const auto outputs = compute_(stage, take(inputs, rows, first, bytes), missing.size());
        for (std::size_t number = 0; number < missing.size(); ++number) {
            Outputs own;
            for (const TensorSpec& spec : stage.gives) {
                const std::vector<float>& all = outputs.at(spec.name);
                const std::size_t size = all.size() / missing.size();
                const auto begin = all.begin() + static_cast<std::ptrdiff_t>(number * size);
                const auto row =
                    std::make_shared<const std::vector<float>>(begin, begin + static_cast<std::ptrdiff_t>(size));
                own.tensors.emplace_back(row, row->data());
                own.bytes += size * sizeof(float);
            }
            bytes_ += own.bytes;
            places_[missing[number]] = rows_.insert(rows_.end(), {missing[number], std::move(own)});
        }
    }
    std::map<std::string, std::vector<SharedRow>> shared;
    for (std::size_t number = 0; number < stage.gives.size(); ++number)
        for (const std::string& key : keys)
            shared[stage.gives[number].name].push_back(places_.at(key)->second.tensors[number]);
    for (; bytes_ > budget_ && !rows_.empty(); rows_.pop_front()) {
        bytes_ -= rows_.front().second.bytes;
        places_.erase(rows_.front().first);
    }
    return shared;
}

}  // namespace dit_runtime
