#include "plugin.hpp"

const dit_runtime::Plugin* dit_plugin() {
    static const dit_runtime::Plugin plugin = {dit_runtime::PLUGIN_BUILD, &dit_runtime::backends()};
    return &plugin;
}
