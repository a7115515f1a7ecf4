// The former name of process.hpp's parser, until every use has moved.
#pragma once

#include "json.hpp"
#include "process.hpp"

namespace dit_runtime {

inline Process diffusion_from_json(const json::Json& table) { return process_from_json(table); }

}  // namespace dit_runtime
