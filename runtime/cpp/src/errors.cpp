#include "errors.hpp"

#include <algorithm>
#include <cctype>
#include <sstream>

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

}  // namespace

std::string concatenate(std::initializer_list<Part> parts) {
    std::ostringstream out;
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
    std::transform(word.begin(), word.end(), word.begin(),
                   [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
    return word;
}

std::string strip(const std::string& word) {
    const auto space = [](unsigned char letter) { return std::isspace(letter) != 0; };
    const auto first = std::find_if_not(word.begin(), word.end(), space);
    const auto last = std::find_if_not(word.rbegin(), std::string::const_reverse_iterator(first), space).base();
    return std::string(first, last);
}

}  // namespace dit_runtime
