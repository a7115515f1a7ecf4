#include "form.hpp"

#include <algorithm>
#include <optional>

#include "body.hpp"
#include "errors.hpp"

namespace server {
namespace {

constexpr std::size_t MOST_BOUNDARY = 70, MOST_NAME = 40;

// A header's value cut at its semicolons; those between quotes count for nothing. None where a quote stays open.
std::optional<std::vector<std::string_view>> split(std::string_view value) {
    std::vector<std::string_view> parts;
    bool quoted = false;
    std::size_t begin = 0;
    for (std::size_t at = 0; at <= value.size(); ++at) {
        if (at < value.size() && value[at] == '"') quoted = !quoted;
        if (at < value.size() && (quoted || value[at] != ';')) continue;
        std::string_view part = value.substr(begin, at - begin);
        while (!part.empty() && (part.front() == ' ' || part.front() == '\t')) part.remove_prefix(1);
        while (!part.empty() && (part.back() == ' ' || part.back() == '\t')) part.remove_suffix(1);
        parts.push_back(part);
        begin = at + 1;
    }
    if (quoted) return std::nullopt;
    return parts;
}

// What stands behind "NAME=" in a part, without its quotes; none where it is no such part.
std::optional<std::string> value_of(std::string_view part, const std::string& name) {
    const std::size_t sign = part.find('=');
    if (sign == std::string_view::npos || dit_runtime::lower(std::string(part.substr(0, sign))) != name)
        return std::nullopt;
    std::string_view value = part.substr(sign + 1);
    if (value.size() >= 2 && value.front() == '"' && value.back() == '"') value = value.substr(1, value.size() - 2);
    return std::string(value);
}

// Whether the first part of a header's value is this word, whatever its case.
bool begins(const std::vector<std::string_view>& parts, const std::string& word) {
    return dit_runtime::lower(std::string(parts.at(0))) == word;
}

std::string boundary(const std::string& type) {
    const auto parts = split(type);
    if (parts && begins(*parts, "multipart/form-data"))
        for (const std::string_view part : *parts) {
            const auto value = value_of(part, "boundary");
            if (!value || value->empty() || value->size() > MOST_BOUNDARY) continue;
            if (value->find_first_of("\\\"") == std::string::npos) return *value;
        }
    throw Fault{400, "the body has no boundary in its Content-Type"};
}

// The name in a part's headers: letters and underscores, and the [] of a list's.
std::optional<std::string> name_of(std::string_view head) {
    const std::string disposition = "content-disposition:";
    while (!head.empty()) {
        const std::size_t length = std::min(head.find("\r\n"), head.size());
        const std::string_view line = head.substr(0, length);
        head.remove_prefix(std::min(length + 2, head.size()));
        if (dit_runtime::lower(std::string(line.substr(0, disposition.size()))) != disposition) continue;
        const auto parts = split(line.substr(disposition.size()));
        if (!parts || !begins(*parts, "form-data")) return std::nullopt;
        for (const std::string_view part : *parts) {
            auto name = value_of(part, "name");
            if (!name) continue;
            if (name->size() > 2 && name->substr(name->size() - 2) == "[]") name->resize(name->size() - 2);
            const bool is_known =
                !name->empty() && name->size() <= MOST_NAME &&
                name->find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_") == std::string::npos;
            return is_known ? name : std::nullopt;
        }
    }
    return std::nullopt;
}

Part parse_part(std::string_view section) {
    const std::size_t blank = section.find("\r\n\r\n");
    if (blank <= MOST_PART_HEAD && section.substr(0, 2) == "\r\n")
        if (auto name = name_of(section.substr(0, blank).substr(std::min<std::size_t>(2, blank))))
            return {*std::move(name), section.substr(blank + 4)};
    throw Fault{400, "a part of the body has no name that is known"};
}

}  // namespace

std::vector<Part> parse_form(const std::string& type, std::string_view content) {
    const std::string line = "--" + boundary(type), delimiter = "\r\n" + line;
    const Fault damaged = {400, "the body is not multipart/form-data, or was cut"};
    if (content.substr(0, line.size()) != line) throw damaged;
    content.remove_prefix(line.size());
    std::vector<std::string_view> sections;
    for (;;) {
        const std::size_t end = content.find(delimiter);
        if (end == std::string_view::npos) break;
        if (sections.size() == MOST_PARTS)
            throw Fault{400, dit_runtime::text("the body has more than ", MOST_PARTS, " parts")};
        sections.push_back(content.substr(0, end));
        content.remove_prefix(end + delimiter.size());
    }
    if (content.substr(0, 2) != "--") throw damaged;
    std::vector<Part> parts;
    for (const std::string_view section : sections) parts.push_back(parse_part(section));
    return parts;
}

}  // namespace server
