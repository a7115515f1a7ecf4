// A body of multipart/form-data (RFC 7578), as OpenAI's clients send pictures; its size was checked before.
// Mirrors dit_serve/form.py.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace server {

constexpr std::size_t MOST_PARTS = 32;
constexpr std::size_t MOST_PART_HEAD = 1024;  // bytes of a part's headers

struct Part {
    std::string name;  // without the [] of a list's
    std::string_view content;
};

// The parts of a body whose Content-Type is `type`, as views of it; throws Fault(400) where it is damaged.
std::vector<Part> parse_form(const std::string& type, std::string_view content);

}  // namespace server
