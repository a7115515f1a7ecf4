// The files that an ONNX graph reads its weights from, by its protobuf alone. Mirrors dit_runtime/bundle/external.py.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace dit_runtime {

// What the graph's tensors say under `location`; std::invalid_argument says why the content is no graph.
std::set<std::string> locations(std::string_view content);

}  // namespace dit_runtime
