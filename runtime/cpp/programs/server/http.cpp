#include "http.hpp"

#include <algorithm>

namespace http {
namespace {

bool is_token(std::string_view word) {
    const auto is_letter = [](char letter) {
        return (letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z') ||
               (letter >= '0' && letter <= '9') ||
               std::string_view("!#$%&'*+-.^_`|~").find(letter) != std::string::npos;
    };
    return !word.empty() && std::all_of(word.begin(), word.end(), is_letter);
}

bool is_between(std::string_view word, unsigned char least, unsigned char most) {
    return std::all_of(word.begin(), word.end(), [&](char letter) {
        const auto byte = static_cast<unsigned char>(letter);
        return byte >= least && byte <= most;
    });
}

std::string lower(std::string_view word) {
    std::string lowered(word);
    for (char& letter : lowered)
        if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
    return lowered;
}

std::string_view trim(std::string_view word) {
    while (!word.empty() && (word.front() == ' ' || word.front() == '\t')) word.remove_prefix(1);
    while (!word.empty() && (word.back() == ' ' || word.back() == '\t')) word.remove_suffix(1);
    return word;
}

// GET /path?query HTTP/1.1
bool read_line(std::string_view line, Request& request) {
    const std::size_t first = line.find(' '), second = line.rfind(' ');
    if (first == std::string::npos || first == second) return false;
    const std::string_view target = line.substr(first + 1, second - first - 1), version = line.substr(second + 1);
    request.method = line.substr(0, first);
    request.path = target.substr(0, target.find('?'));
    request.keep_alive = version == "HTTP/1.1";
    return is_token(request.method) && !target.empty() && target[0] == '/' && is_between(target, 0x21, 0x7e) &&
           (version == "HTTP/1.1" || version == "HTTP/1.0");
}

// Name: value. A line that goes on with the one before is refused, and so is a second value of what must be clear.
bool read_header(std::string_view line, Request& request) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos || !is_token(line.substr(0, colon))) return false;
    const std::string name = lower(line.substr(0, colon));
    const std::string value(trim(line.substr(colon + 1)));
    for (const char letter : value)
        if (static_cast<unsigned char>(letter) < 0x20 && letter != '\t') return false;
    const bool is_new = request.headers.emplace(name, value).second;
    const char* const single[] = {"content-length", "host", "transfer-encoding", "authorization", "content-type"};
    return is_new || std::find(std::begin(single), std::end(single), name) == std::end(single);
}

const char* reason(int status) {
    static const std::map<int, const char*> reasons = {{100, "Continue"},
                                                       {200, "OK"},
                                                       {202, "Accepted"},
                                                       {400, "Bad Request"},
                                                       {401, "Unauthorized"},
                                                       {403, "Forbidden"},
                                                       {404, "Not Found"},
                                                       {405, "Method Not Allowed"},
                                                       {408, "Request Timeout"},
                                                       {411, "Length Required"},
                                                       {413, "Content Too Large"},
                                                       {415, "Unsupported Media Type"},
                                                       {429, "Too Many Requests"},
                                                       {431, "Request Header Fields Too Large"},
                                                       {500, "Internal Server Error"},
                                                       {501, "Not Implemented"},
                                                       {503, "Service Unavailable"},
                                                       {504, "Gateway Timeout"}};
    const auto known = reasons.find(status);
    return known == reasons.end() ? "Unknown" : known->second;
}

}  // namespace

Head read_head(std::string_view bytes) {
    Head head;
    const std::size_t end = bytes.substr(0, MOST_HEAD).find("\r\n\r\n");
    if (end == std::string::npos) {
        head.refusal = bytes.size() >= MOST_HEAD ? 431 : 0;
        return head;
    }
    head.bytes = end + 4;
    head.refusal = 400;
    std::string_view lines = bytes.substr(0, end);
    const auto next_line = [&] {
        const std::size_t length = std::min(lines.find("\r\n"), lines.size());
        const std::string_view line = lines.substr(0, length);
        lines.remove_prefix(std::min(length + 2, lines.size()));
        return line;
    };
    if (!read_line(next_line(), head.request)) return head;
    for (std::size_t number = 0; !lines.empty(); ++number) {
        if (number == MOST_HEADERS) {
            head.refusal = 431;
            return head;
        }
        if (!read_header(next_line(), head.request)) return head;
    }
    const std::string connection = lower(head.request.header("connection"));
    if (connection.find("close") != std::string::npos) head.request.keep_alive = false;
    const auto length = head.request.headers.find("content-length");
    if (length != head.request.headers.end()) {
        if (length->second.empty() || !is_between(length->second, '0', '9')) return head;
        head.has_length = true;
        head.length = length->second.size() > 12 ? SIZE_MAX : std::stoull(length->second);
    }
    head.refusal = 0;
    return head;
}

std::string write(const Response& response, bool keep_alive, bool body) {
    std::string bytes = "HTTP/1.1 " + std::to_string(response.status) + ' ' + reason(response.status) + "\r\n";
    const auto add = [&](const std::string& name, const std::string& value) { bytes += name + ": " + value + "\r\n"; };
    add("Content-Type", response.type);
    add("Content-Length", std::to_string(response.body.size()));
    add("Cache-Control", "no-store");
    add("X-Content-Type-Options", "nosniff");
    if (!keep_alive) add("Connection", "close");
    for (const auto& [name, value] : response.headers) add(name, value);
    bytes += "\r\n";
    return body ? bytes + response.body : bytes;
}

}  // namespace http
