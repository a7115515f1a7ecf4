// What a plugin exports: the backends of one engine library.
#pragma once

#include <vector>

#include "dit/dit.h"
#include "engine.hpp"

namespace dit_runtime {

// Plugins and libdit share C++ types, so both must come from the same version.
#define DIT_PLUGIN_TEXT(word) DIT_PLUGIN_TEXT_OF(word)
#define DIT_PLUGIN_TEXT_OF(word) #word
inline const char* const PLUGIN_BUILD =
    DIT_PLUGIN_TEXT(DIT_VERSION_MAJOR) "." DIT_PLUGIN_TEXT(DIT_VERSION_MINOR) "." DIT_PLUGIN_TEXT(DIT_VERSION_PATCH);

struct Plugin {
    const char* build;
    const std::vector<Backend>* backends;
};

}  // namespace dit_runtime

extern "C" __attribute__((visibility("default"))) const dit_runtime::Plugin* dit_plugin();
