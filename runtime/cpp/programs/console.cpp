#include "console.hpp"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <new>
#include <stdexcept>

#include "errors.hpp"

std::string json_text(const std::string& text) {
    std::string json = "\"";
    for (const char letter : dit_runtime::printable(text)) {
        if (letter == '"' || letter == '\\') json += '\\';
        if (static_cast<unsigned char>(letter) >= 0x20) json += letter;
    }
    return json + "\"";
}

int exit_code(const std::exception& error) {
    const bool refused = dynamic_cast<const std::runtime_error*>(&error) ||
                         dynamic_cast<const std::invalid_argument*>(&error) ||
                         dynamic_cast<const std::bad_alloc*>(&error);
    return refused ? REFUSED : BUG;
}

int report(const std::string& program, const std::exception& error, int code, int count, char** words) {
    const std::string message = dit_runtime::one_line((code == BUG ? "a bug: " : "") + std::string(error.what()));
    std::cerr << dit_runtime::one_line(program + ": error: " + message) << '\n';
    const char* const kind = code == FAILED ? "failed" : code == REFUSED ? "refused" : "bug";
    if (std::find(words, words + count, std::string("--json")) != words + count)
        std::printf("{\"error\": {\"kind\": \"%s\", \"message\": %s, \"exit_code\": %d}}\n", kind,
                    json_text(message).c_str(), code);
    return code;
}
