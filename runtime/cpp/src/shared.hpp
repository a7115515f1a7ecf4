// A memo of the stages before the loop that all requests share. Mirrors dit_runtime/serve/shared.py.
#pragma once

#include <atomic>
#include <list>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "memo.hpp"

namespace dit_runtime {

// Each row of a stage's inputs is computed once, whichever request it belongs to; what was not used for the longest
// time goes first. One thread at a time calls it.
//
// A row is known by the sha256 of its bytes, so that the embeddings of captions need not be held.
class SharedMemo {
  public:
    explicit SharedMemo(RunStage compute, std::size_t budget = MEMO_BYTES)
        : compute_(std::move(compute)), budget_(budget) {}

    // The stage's outputs. Who holds a row shares its memory, also when it has gone from here.
    std::map<std::string, std::vector<SharedRow>> operator()(const Stage& stage, const std::vector<Input>& inputs,
                                                             std::size_t rows);

    std::size_t bytes() const { return bytes_; }
    std::atomic<std::size_t> hits{0}, misses{0};

  private:
    struct Outputs {  // of a row, in the stage's order
        std::vector<SharedRow> tensors;
        std::size_t bytes = 0;
    };
    using Kept = std::list<std::pair<std::string, Outputs>>;

    const RunStage compute_;
    const std::size_t budget_;
    Kept rows_;  // the latest last
    std::unordered_map<std::string, Kept::iterator> places_;
    std::size_t bytes_ = 0;
};

}  // namespace dit_runtime
