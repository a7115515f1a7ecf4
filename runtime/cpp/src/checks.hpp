// The checks that a manifest's ports and stages fit together.
#pragma once

#include "manifest.hpp"

namespace dit_runtime {

// Refuses ports, constants and stages that do not fit: every input of a stage needs a source.
void check(const Manifest& manifest);

// Refuses sizes that share a name, their own files, or the name of stages that differ.
void check_sizes(const Manifest& manifest);

}  // namespace dit_runtime
