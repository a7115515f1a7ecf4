// A little work at the batch sizes of later requests, so that the first of these waits for no compiler.
// Mirrors dit_runtime/warming.py.
#pragma once

#include <cstdint>
#include <vector>

#include "condition.hpp"

namespace dit_runtime {

class Pipeline;

// Refuses batch sizes that no stage runs at, and warming of what does not stay open.
void require_warmable(const Manifest& manifest, const std::vector<std::int64_t>& batches, bool low_memory);

// Begins a run at each batch size, with guidance and without, and decodes what it has reached.
void warm(Pipeline& pipe, const std::vector<std::int64_t>& batches);

// A condition of made-up numbers, all tokens counted, without guidance; labels one after the other. A bundle that takes
// prompts gets token ids, so that its prompt stage runs too.
Rows made_up(const Manifest& manifest, std::size_t count);

}  // namespace dit_runtime
