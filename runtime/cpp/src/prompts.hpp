// Prompts as token ids, which a request may bring in the place of the condition ports that the prompt stage gives.
// Mirrors dit_runtime/conditions/text.py, but for tokenizers: C++ takes ids.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "condition.hpp"
#include "memo.hpp"

namespace dit_runtime {

// The prompt stage's inputs as ports, so that they are checked as a condition's arrays are.
std::vector<Port> prompt_ports(const Manifest& manifest);

// Whether arrays stand for a prompt: its ids, or what the prompt stage would give.
bool has_prompt(const Manifest& manifest, const Arrays& arrays);

// What a condition with these arrays fills: the prompt stage's inputs where it has some of them, else what the stage
// gives; and all other condition ports. The port of the guidance weight may be left out.
std::vector<Port> filled_ports(const Manifest& manifest, const Arrays& arrays);

// What the prompt stage gives for the latest prompts, by their ids and masks, in so many bytes. Any thread may call it.
class PromptMemo {
  public:
    explicit PromptMemo(std::size_t budget = MEMO_BYTES) : budget_(budget) {}

    // The rows of every condition port, those of token ids through the prompt stage. Distinct prompts that are not
    // there run, each once.
    Rows operator()(const Manifest& manifest, const RunStage& run, const Rows& rows);

  private:
    using Outputs = std::shared_ptr<const std::map<std::string, std::vector<float>>>;
    struct Encoded {
        std::string key;  // the bytes of its ids and masks
        Outputs outputs;
    };

    Outputs find(const std::string& key);
    void add(const std::string& key, const Outputs& outputs);

    std::size_t budget_;
    std::mutex mutex_;
    std::list<Encoded> encoded_;  // the latest last
};

}  // namespace dit_runtime
