// Where ONNX Runtime runs each node, from its table of functions of 1.24 and later.
#include <cstddef>
#include <cstring>

#include "ort.hpp"

namespace dit_runtime::ort {
namespace {

constexpr std::uint32_t VERSION = 24;
constexpr std::size_t PLACE = 407;  // of the first of these in OrtApi, whose entries never move

struct Subgraph;
struct Node;

// Declared here, since Debian's headers are older than that.
struct Functions {
    OrtStatus*(ORT_API_CALL* subgraphs)(const OrtSession*, const Subgraph* const**, std::size_t*);
    OrtStatus*(ORT_API_CALL* provider)(const Subgraph*, const char**);
    OrtStatus*(ORT_API_CALL* nodes)(const Subgraph*, const Node* const**, std::size_t*);
    OrtStatus*(ORT_API_CALL* node_name)(const Node*, const char**);
    OrtStatus*(ORT_API_CALL* node_domain)(const Node*, const char**);
    OrtStatus*(ORT_API_CALL* node_op)(const Node*, const char**);
};

#if ORT_API_VERSION >= 24
static_assert(offsetof(OrtApi, Session_GetEpGraphAssignmentInfo) == PLACE * sizeof(void*));
#endif

Functions functions() {
    const OrtApi* const table = OrtGetApiBase()->GetApi(VERSION);
    if (!table)
        throw UsageError(text("ONNX Runtime ", OrtGetApiBase()->GetVersionString(),
                              " does not say where its nodes run; device cuda needs 1.", VERSION, " or later"));
    Functions functions;
    std::memcpy(&functions, reinterpret_cast<const char*>(table) + PLACE * sizeof(void*), sizeof(functions));
    return functions;
}

template <typename T>
std::string word(OrtStatus* (*get)(const T*, const char**), const T* of) {
    const char* text = nullptr;
    check(get(of, &text));
    return text;
}

}  // namespace

std::vector<Placement> placements(const OrtSession* session) {
    const Functions get = functions();
    std::vector<Placement> all;
    const Subgraph* const* subgraphs = nullptr;
    std::size_t length = 0;
    check(get.subgraphs(session, &subgraphs, &length));
    for (std::size_t index = 0; index < length; ++index) {
        const std::string provider = word(get.provider, subgraphs[index]);
        const Node* const* nodes = nullptr;
        std::size_t size = 0;
        check(get.nodes(subgraphs[index], &nodes, &size));
        for (std::size_t node = 0; node < size; ++node) all.push_back({provider, word(get.node_op, nodes[node])});
    }
    return all;
}

void require_placement(const Path& path, const std::vector<Placement>& placements) {
    static const std::vector<std::string> heavy = {"MatMul", "Gemm", "Conv", "Attention", "LayerNormalization"};
    const auto ends = [](const std::string& op, const std::string& end) {
        return op.size() >= end.size() && op.compare(op.size() - end.size(), end.size(), end) == 0;
    };
    std::map<std::string, int> wrong;
    for (const auto& [provider, op] : placements)
        for (const std::string& end : heavy)
            if (provider != "CUDAExecutionProvider" && ends(op, end)) wrong[op] += 1;
    if (wrong.empty()) return;
    std::vector<std::string> listed;
    for (const auto& [op, count] : wrong) listed.push_back(text(count, " ", op));
    throw UsageError(text(path.string(), ": ONNX Runtime has no CUDA kernel for ", join(listed), "; use device cpu"));
}

}  // namespace dit_runtime::ort
