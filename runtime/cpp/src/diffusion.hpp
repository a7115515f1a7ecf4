// The manifest's `diffusion` section.
#pragma once

#include "json.hpp"
#include "manifest.hpp"

namespace dit_runtime {

Diffusion diffusion_from_json(const json::Json& table);

}  // namespace dit_runtime
