#include "prompts.hpp"

#include <algorithm>

#include "errors.hpp"

namespace dit_runtime {
namespace {

std::string key_of(const Stage& stage, const Rows& rows, std::size_t row) {
    std::string key;
    for (const TensorSpec& spec : stage.reads) {
        const Tensor& tensor = rows.arrays.at(spec.name);
        const std::size_t bytes = tensor.row_size() * tensor.item_size();
        key.append(reinterpret_cast<const char*>(tensor.data()) + row * bytes, bytes);
    }
    return key;
}

bool any_in(const std::vector<TensorSpec>& specs, const Arrays& arrays) {
    return std::any_of(specs.begin(), specs.end(),
                       [&](const TensorSpec& spec) { return arrays.count(spec.name) != 0; });
}

using Encodings = std::vector<std::shared_ptr<const std::map<std::string, std::vector<float>>>>;

// Runs the stage on some of the rows; one entry each.
Encodings compute(const Stage& stage, const RunStage& run, const Rows& rows, const std::vector<std::size_t>& some) {
    Rows batch = slice(rows, some[0], some[0] + 1);
    for (std::size_t place = 1; place < some.size(); ++place)
        batch = stack(batch, slice(rows, some[place], some[place] + 1));
    std::vector<Input> inputs;
    for (const TensorSpec& spec : stage.reads) inputs.push_back(batch.arrays.at(spec.name).input(spec.name));
    const auto outputs = run(stage, inputs, some.size());
    for (const auto& [name, values] : outputs)
        if (!all_finite(values))
            throw NotFinite(text("the ", stage.name, "'s ", name, " holds values that are not finite"));
    Encodings encodings;
    for (std::size_t place = 0; place < some.size(); ++place) {
        std::map<std::string, std::vector<float>> prompt;
        for (const auto& [name, values] : outputs) {
            const auto size = static_cast<std::ptrdiff_t>(values.size() / some.size());
            const auto row = values.begin() + static_cast<std::ptrdiff_t>(place) * size;
            prompt[name].assign(row, row + size);
        }
        encodings.push_back(std::make_shared<const std::map<std::string, std::vector<float>>>(std::move(prompt)));
    }
    return encodings;
}

}  // namespace

std::vector<Port> prompt_ports(const Manifest& manifest) {
    std::vector<Port> ports;
    for (const Prompt& prompt : manifest.prompts) {
        ports.push_back({prompt.ids, "condition", "int64", {prompt.tokens}, prompt.size});
        if (!prompt.mask.empty()) ports.push_back({prompt.mask, "condition", "int64", {prompt.tokens}, 2});
    }
    return ports;
}

bool has_prompt(const Manifest& manifest, const Arrays& arrays) {
    const Stage* const stage = manifest.prompt();
    return stage && (any_in(stage->reads, arrays) || any_in(stage->gives, arrays));
}

std::vector<Port> filled_ports(const Manifest& manifest, const Arrays& arrays) {
    const Stage* const stage = manifest.prompt();
    const bool by_ids = stage && any_in(stage->reads, arrays);
    std::vector<Port> ports = by_ids ? prompt_ports(manifest) : std::vector<Port>();
    for (const Port& port : manifest.conditions()) {
        const bool made = by_ids && dit_runtime::find(stage->gives, port.name);
        const bool left_out = port.name == manifest.guidance.port && !arrays.count(port.name);
        if (!made && !left_out) ports.push_back(port);
    }
    return ports;
}

Rows PromptMemo::operator()(const Manifest& manifest, const RunStage& run, const Rows& rows) {
    const Stage* const stage = manifest.prompt();
    if (!stage || !any_in(stage->reads, rows.arrays)) return rows;
    std::vector<std::string> keys;
    std::vector<std::size_t> missing;
    std::map<std::string, Outputs> encoded;
    for (std::size_t row = 0; row < rows.rows; ++row) {
        keys.push_back(key_of(*stage, rows, row));
        if (const auto [place, is_new] = encoded.try_emplace(keys.back());
            is_new && !(place->second = find(keys.back())))
            missing.push_back(row);
    }
    const auto size = static_cast<std::ptrdiff_t>(stage->max_batch);
    for (auto first = missing.begin(); first != missing.end();) {
        const auto last = first + std::min(size, missing.end() - first);
        const auto computed = compute(*stage, run, rows, {first, last});
        for (auto row = first; row != last; ++row)
            add(keys[*row], encoded[keys[*row]] = computed[static_cast<std::size_t>(row - first)]);
        first = last;
    }
    Rows all = rows;
    for (const TensorSpec& spec : stage->reads) all.arrays.erase(spec.name);
    for (const TensorSpec& spec : stage->gives) {
        Tensor& tensor = all.arrays[spec.name];
        tensor.shape = with_rows(rows.rows, spec.row());
        for (const std::string& key : keys) {
            const std::vector<float>& row = encoded.at(key)->at(spec.name);
            tensor.floats.insert(tensor.floats.end(), row.begin(), row.end());
        }
    }
    return all;
}

// What is there of a prompt, which then is the latest; else nothing.
PromptMemo::Outputs PromptMemo::find(const std::string& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto place =
        std::find_if(encoded_.begin(), encoded_.end(), [&](const Encoded& prompt) { return prompt.key == key; });
    if (place == encoded_.end()) return nullptr;
    encoded_.splice(encoded_.end(), encoded_, place);
    return place->outputs;
}

// Adds a prompt, and drops the oldest over the budget. Another thread may have computed the same.
void PromptMemo::add(const std::string& key, const Outputs& outputs) {
    const std::lock_guard<std::mutex> lock(mutex_);
    encoded_.remove_if([&](const Encoded& prompt) { return prompt.key == key; });
    encoded_.push_back({key, outputs});
    const auto bytes = [](const Encoded& prompt) {
        std::size_t sum = 0;
        for (const auto& output : *prompt.outputs) sum += output.second.size() * sizeof(float);
        return sum;
    };
    std::size_t total = 0;
    for (const Encoded& prompt : encoded_) total += bytes(prompt);
    for (; total > budget_; encoded_.pop_front()) total -= bytes(encoded_.front());
}

}  // namespace dit_runtime
