// Typed access to JSON: a missing value or one of another kind is a std::invalid_argument that names it.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "errors.hpp"

namespace dit_runtime::json {

using Json = nlohmann::json;

[[noreturn]] inline void refuse(const std::string& where, const Json& value, const std::string& expected) {
    // dump() calls itself for what is inside, however deep a file nests that.
    std::string shown = value.is_array()    ? "a list"
                        : value.is_object() ? "a table"
                                            : value.dump(-1, ' ', true, Json::error_handler_t::replace);
    if (value.is_string() && shown.size() > 2) shown = shown.substr(1, shown.size() - 2);  // as Python shows it
    if (shown.size() > 100) shown = shown.substr(0, 97) + "...";
    throw std::invalid_argument(where + ": got " + shown + ", expected " + expected);
}

inline const Json& need(const Json& table, const std::string& key) {
    if (!table.is_object()) refuse("the parent of " + key, table, "a table");
    const auto entry = table.find(key);
    if (entry == table.end()) throw std::invalid_argument("'" + key + "' is missing");
    return *entry;
}

inline std::int64_t integer(const Json& value, const std::string& name, std::int64_t least, std::int64_t most) {
    const bool fits = value.is_number_integer() &&
                      !(value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t{INT64_MAX}) &&
                      value.get<std::int64_t>() >= least && value.get<std::int64_t>() <= most;
    if (!fits) refuse(name, value, text("an integer from ", least, " to ", most));
    return value.get<std::int64_t>();
}

inline double number(const Json& value, const std::string& name) {
    if (!value.is_number() || !std::isfinite(value.get<double>())) refuse(name, value, "a finite number");
    return value.get<double>();
}

inline bool boolean(const Json& value, const std::string& name) {
    if (!value.is_boolean()) refuse(name, value, "true or false");
    return value.get<bool>();
}

inline std::string string(const Json& value, const std::string& name) {
    if (!value.is_string()) refuse(name, value, "a string");
    return value.get<std::string>();
}

inline const Json& list(const Json& value, const std::string& name) {
    if (!value.is_array()) refuse(name, value, "a list");
    return value;
}

inline const Json& table(const Json& value, const std::string& name) {
    if (!value.is_object()) refuse(name, value, "a table");
    return value;
}

inline void known_keys(const Json& value, const std::string& where, const std::vector<std::string>& known) {
    for (const auto& entry : table(value, where).items())
        if (std::find(known.begin(), known.end(), entry.key()) == known.end())
            throw std::invalid_argument(text(where, ": unknown key '", entry.key(), "'", nearest(entry.key(), known),
                                             "; known: ", join(known)));
}

}  // namespace dit_runtime::json
