// Whether a manifest's ports and stages fit together.
#pragma once

#include <stdexcept>
#include <string>

#include "errors.hpp"
#include "manifest.hpp"

namespace dit_runtime {

template <typename Value>
[[noreturn]] void refuse(const std::string& where, const Value& value, const std::string& expected) {
    throw std::invalid_argument(text(where, ": got ", value, ", expected ", expected));
}

// Refuses ports, constants and stages that do not fit: every input of a stage needs a source.
void check(const Manifest& manifest);

}  // namespace dit_runtime
