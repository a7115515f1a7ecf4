// The user's own mistakes and an engine's failures: one sentence that says what, where, got and expected, what next.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace dit_runtime {

// Bad usage or bad input.
struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A bundle that is damaged, of another format, or cannot run here.
struct BundleError : UsageError {
    using UsageError::UsageError;
};

// The library of an engine is not here.
struct NoBackend : UsageError {
    using UsageError::UsageError;
};

// The engine has no such device here.
struct NoDevice : UsageError {
    using UsageError::UsageError;
};

// An engine gave something that no sound engine gives.
struct EngineError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Values of an engine that are not finite.
struct NotFinite : EngineError {
    using EngineError::EngineError;
};

// An engine has no memory left, on the host or on its device.
struct EngineMemory : EngineError {
    using EngineError::EngineError;
};

// A device failed, and takes no more work from this process.
struct DeviceLost : EngineError {
    using EngineError::EngineError;
};

// The caller asked to stop the call.
struct Stopped : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A value and how to write it: so that what joins them is compiled once, not for each message.
struct Part {
    template <typename Value>
    Part(const Value& value)
        : value(&value), write([](std::ostream& out, const void* it) { out << *static_cast<const Value*>(it); }) {}
    Part(const char* words)
        : value(words), write([](std::ostream& out, const void* it) { out << static_cast<const char*>(it); }) {}

    const void* value;
    void (*write)(std::ostream& out, const void* value);
};

std::string concatenate(std::initializer_list<Part> parts);

// The parts as one text: text("steps is ", 0).
template <typename... Parts>
std::string text(const Parts&... parts) {
    return concatenate({Part(parts)...});
}

inline bool contains(const std::vector<std::string>& known, const std::string& word) {
    return std::find(known.begin(), known.end(), word) != known.end();
}

inline bool all_finite(const float* values, std::size_t count) {
    return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}
inline bool all_finite(const std::vector<float>& values) { return all_finite(values.data(), values.size()); }

std::string join(const std::vector<std::string>& words, const std::string& separator = ", ");

// ' (did you mean "…"?)' where something known is close, else nothing.
std::string nearest(const std::string& word, const std::vector<std::string>& known);

// The number that all of the word says, whatever the program's locale.
std::optional<double> number(const std::string& word);

// A text of any source, whose characters a terminal shows and does not obey; line breaks stay. Mirrors console.py.
std::string printable(const std::string& message);
// The same in one line, without the middle of a long one.
std::string one_line(const std::string& message, std::size_t most = 300);

// As Python's str.lower and str.strip do for ASCII.
std::string lower(std::string word);
std::string strip(const std::string& word);

}  // namespace dit_runtime
