// JSON to a manifest.
#pragma once

#include "json.hpp"
#include "manifest.hpp"

namespace dit_runtime {

// Checks every key, type and shape, and that every input of a stage has a source; std::invalid_argument says what is
// wrong.
Manifest parse_table(const json::Json& table);

}  // namespace dit_runtime
