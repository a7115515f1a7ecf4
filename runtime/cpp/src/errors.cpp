#include "errors.hpp"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <iterator>
#include <locale>
#include <numeric>
#include <sstream>
#include <string_view>
#include <utility>

namespace dit_runtime {
namespace {

// Characters that two words share by Ratcliff and Obershelp: the longest common run, then left and right of it.
std::size_t matches(const std::string& a, const std::string& b) {
    std::size_t best = 0, start_a = 0, start_b = 0;
    std::vector<std::size_t> runs(b.size() + 1, 0);
    for (std::size_t i = 0; i < a.size(); ++i) {
        std::size_t diagonal = 0;
        for (std::size_t j = 0; j < b.size(); ++j) {
            const std::size_t run = a[i] == b[j] ? diagonal + 1 : 0;
            diagonal = runs[j + 1];
            runs[j + 1] = run;
            if (run > best) best = run, start_a = i + 1 - run, start_b = j + 1 - run;
        }
    }
    if (best == 0) return 0;
    return best + matches(a.substr(0, start_a), b.substr(0, start_b)) +
           matches(a.substr(start_a + best), b.substr(start_b + best));
}

// The length of the UTF-8 character that begins here, and its number; 0 where none does.
std::pair<std::size_t, std::uint32_t> character(std::string_view text) {
    const auto byte = [&](std::size_t at) { return static_cast<unsigned char>(text[at]); };
    const std::uint32_t first = byte(0);
    if (first < 0x80) return {1, first};
    const std::size_t length = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
    if (first < 0xC2 || first > 0xF4 || length > text.size()) return {0, 0};
    std::uint32_t code = first & (0xFFu >> (length + 1));
    for (std::size_t at = 1; at < length; ++at) {
        if ((byte(at) & 0xC0) != 0x80) return {0, 0};
        code = code << 6 | (byte(at) & 0x3Fu);
    }
    const std::uint32_t least = length == 4 ? 0x10000 : length == 3 ? 0x800 : 0x80;
    if (code < least || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) return {0, 0};
    return {length, code};
}

// Whether a terminal shows it and does not obey: no control, format, separator or private character of Unicode 15.
bool is_shown(std::uint32_t code) {
    static constexpr std::pair<std::uint32_t, std::uint32_t> hidden[] = {
        {0x00, 0x1F},       {0x7F, 0xA0},       {0xAD, 0xAD},       {0x600, 0x605},     {0x61C, 0x61C},
        {0x6DD, 0x6DD},     {0x70F, 0x70F},     {0x890, 0x891},     {0x8E2, 0x8E2},     {0x1680, 0x1680},
        {0x180E, 0x180E},   {0x2000, 0x200F},   {0x2028, 0x202F},   {0x205F, 0x206F},   {0x3000, 0x3000},
        {0xE000, 0xF8FF},   {0xFDD0, 0xFDEF},   {0xFEFF, 0xFEFF},   {0xFFF0, 0xFFFB},   {0xFFFE, 0xFFFF},
        {0x110BD, 0x110BD}, {0x110CD, 0x110CD}, {0x13430, 0x1343F}, {0x1BCA0, 0x1BCA3}, {0x1D173, 0x1D17A},
        {0xE0000, 0xE00FF}, {0xE01F0, 0x10FFFF}};
    return std::none_of(std::begin(hidden), std::end(hidden),
                        [&](const auto& range) { return range.first <= code && code <= range.second; });
}

// The characters of a text, each as itself or as an escape of Python's that begins with a backslash.
std::vector<std::string> marks(std::string_view text) {
    std::vector<std::string> shown;
    while (!text.empty()) {
        const auto [length, code] = character(text);
        char escape[12];
        if (!length)
            std::snprintf(escape, sizeof escape, "\\x%02x", static_cast<unsigned char>(text[0]));
        else
            std::snprintf(escape, sizeof escape,
                          code < 0x100     ? "\\x%02x"
                          : code < 0x10000 ? "\\u%04x"
                                           : "\\U%08x",
                          code);
        const std::size_t taken = std::max<std::size_t>(1, length);
        shown.push_back(length && (is_shown(code) || code == '\n') ? std::string(text.substr(0, taken)) : escape);
        text.remove_prefix(taken);
    }
    return shown;
}

}  // namespace

std::string concatenate(std::initializer_list<Part> parts) {
    std::ostringstream out;
    out.imbue(std::locale::classic());  // a program's locale may write 1,000.5
    for (const Part& part : parts) part.write(out, part.value);
    return out.str();
}

std::string join(const std::vector<std::string>& words, const std::string& separator) {
    std::string joined;
    for (const auto& word : words) joined += (joined.empty() ? "" : separator) + word;
    return joined;
}

std::string nearest(const std::string& word, const std::vector<std::string>& known) {
    if (word.size() > 100) return "";
    std::string close;
    double best = 0.6;
    for (const auto& name : known) {
        if (name.size() > 100 || name.empty()) continue;
        const std::size_t shared = matches(lower(word), lower(name));
        const double ratio = 2.0 * static_cast<double>(shared) / static_cast<double>(word.size() + name.size());
        if (ratio >= best) best = ratio, close = name;
    }
    return close.empty() ? "" : " (did you mean \"" + close + "\"?)";
}

std::string lower(std::string word) {
    std::transform(word.begin(), word.end(), word.begin(), [](char letter) {
        return letter >= 'A' && letter <= 'Z' ? static_cast<char>(letter + 32) : letter;
    });
    return word;
}

std::optional<double> number(const std::string& word) {
    const char* const begin = word.data() + (word.size() > 1 && word[0] == '+' && word[1] != '-');
    double value = 0;
    const auto [end, failure] = std::from_chars(begin, word.data() + word.size(), value);
    if (failure != std::errc() || end != word.data() + word.size()) return std::nullopt;
    return value;
}

std::string printable(const std::string& message) {
    std::string shown;
    for (const std::string& mark : marks(message)) shown += mark;
    return shown;
}

std::string one_line(const std::string& message, std::size_t most) {
    // Of a message of megabytes, the middle goes before it is looked at.
    const std::size_t side = 8 * most;
    std::string words;
    std::istringstream stream(
        message.size() > 4 * side ? message.substr(0, side) + message.substr(message.size() - side) : message);
    stream.imbue(std::locale::classic());
    for (std::string word; stream >> word;) words += (words.empty() ? "" : " ") + word;
    const std::vector<std::string> shown = marks(words);
    const auto size = [](std::size_t sum, const std::string& mark) {
        return sum + (mark[0] == '\\' ? mark.size() : 1);
    };
    if (std::accumulate(shown.begin(), shown.end(), std::size_t{0}, size) <= most)
        return std::accumulate(shown.begin(), shown.end(), std::string());
    const std::size_t end = most / 3, begin = most - end - 3;
    std::size_t first = 0, last = shown.size();
    for (std::size_t sum = 0; (sum = size(sum, shown[first])) <= begin;) ++first;
    for (std::size_t sum = 0; (sum = size(sum, shown[last - 1])) <= end;) --last;
    const auto join_marks = [&](std::size_t from, std::size_t to) {
        return std::accumulate(shown.begin() + static_cast<std::ptrdiff_t>(from),
                               shown.begin() + static_cast<std::ptrdiff_t>(to), std::string());
    };
    return join_marks(0, first) + " … " + join_marks(last, shown.size());
}

std::string strip(const std::string& word) {
    const auto space = [](char letter) { return letter == ' ' || (letter >= '\t' && letter <= '\r'); };
    const auto first = std::find_if_not(word.begin(), word.end(), space);
    const auto last = std::find_if_not(word.rbegin(), std::string::const_reverse_iterator(first), space).base();
    return std::string(first, last);
}

}  // namespace dit_runtime
