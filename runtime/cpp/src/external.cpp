#include "external.hpp"

#include <cstdint>
#include <map>
#include <stdexcept>

#include "errors.hpp"

namespace dit_runtime {
namespace {

constexpr int DEEPEST = 64;                                     // messages in each other
constexpr int VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5;  // wire types
constexpr std::uint64_t KEY = 1, VALUE = 2;                     // of an entry

enum class Kind { MODEL, TRAINING, FUNCTION, GRAPH, NODE, ATTRIBUTE, SPARSE, TENSOR, ENTRY };

// Message -> its fields that can hold tensors, and of what message they are (onnx.proto3).
const std::map<Kind, std::map<std::uint64_t, Kind>> FIELDS = {
    {Kind::MODEL, {{7, Kind::GRAPH}, {20, Kind::TRAINING}, {25, Kind::FUNCTION}}},
    {Kind::TRAINING, {{1, Kind::GRAPH}, {2, Kind::GRAPH}}},
    {Kind::FUNCTION, {{7, Kind::NODE}, {11, Kind::ATTRIBUTE}}},
    {Kind::GRAPH, {{1, Kind::NODE}, {5, Kind::TENSOR}, {15, Kind::SPARSE}}},
    {Kind::NODE, {{5, Kind::ATTRIBUTE}}},
    {Kind::ATTRIBUTE,
     {{5, Kind::TENSOR},
      {6, Kind::GRAPH},
      {10, Kind::TENSOR},
      {11, Kind::GRAPH},
      {22, Kind::SPARSE},
      {23, Kind::SPARSE}}},
    {Kind::SPARSE, {{1, Kind::TENSOR}, {2, Kind::TENSOR}}},
    {Kind::TENSOR, {{13, Kind::ENTRY}}},
};

std::uint64_t take_varint(std::string_view& message) {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 70; shift += 7) {
        if (message.empty()) throw std::invalid_argument("it ends too early");
        const auto byte = static_cast<unsigned char>(message.front());
        message.remove_prefix(1);
        if (shift < 64) value |= std::uint64_t{byte & 0x7Fu} << shift;
        if (byte < 0x80) return value;
    }
    throw std::invalid_argument("a number of more than 64 bits");
}

// Calls with number and content of each field that is a message, a text or bytes.
template <typename Call>
void each_field(std::string_view message, const Call& call) {
    while (!message.empty()) {
        const std::uint64_t tag = take_varint(message);
        const int kind = static_cast<int>(tag & 7);
        if (kind == VARINT) {
            take_varint(message);
            continue;
        }
        if (kind != FIXED64 && kind != BYTES && kind != FIXED32) throw std::invalid_argument(text("wire type ", kind));
        const std::uint64_t length = kind == FIXED64 ? 8 : kind == FIXED32 ? 4 : take_varint(message);
        if (length > message.size()) throw std::invalid_argument("it ends too early");
        if (kind == BYTES) call(tag >> 3, message.substr(0, static_cast<std::size_t>(length)));
        message.remove_prefix(static_cast<std::size_t>(length));
    }
}

void collect(std::string_view message, Kind kind, int depth, std::set<std::string>& locations) {
    if (depth > DEEPEST) throw std::invalid_argument(text("graphs are in each other more than ", DEEPEST, " deep"));
    if (kind == Kind::ENTRY) {
        std::string_view key, value;
        each_field(message, [&](std::uint64_t number, std::string_view part) {
            if (number == KEY) key = part;
            if (number == VALUE) value = part;
        });
        if (key == "location") locations.emplace(value);
        return;
    }
    const std::map<std::uint64_t, Kind>& fields = FIELDS.at(kind);
    each_field(message, [&](std::uint64_t number, std::string_view part) {
        if (const auto field = fields.find(number); field != fields.end())
            collect(part, field->second, depth + 1, locations);
    });
}

}  // namespace

std::set<std::string> locations(std::string_view content) {
    std::set<std::string> locations;
    collect(content, Kind::MODEL, 0, locations);
    return locations;
}

}  // namespace dit_runtime
