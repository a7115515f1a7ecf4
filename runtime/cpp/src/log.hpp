// What the library says to those who listen; nothing is printed.
#pragma once

#include <functional>
#include <string>

namespace dit_runtime {

enum class Severity { ERROR, WARNING, INFO, DEBUG };

// Any thread calls it, several at the same time; it must not throw.
using OnLog = std::function<void(Severity severity, const std::string& line)>;

// Lines of this severity and graver ones go there; an empty function: nowhere.
void set_log(OnLog on_log, Severity least);

void log(Severity severity, const std::string& line);

}  // namespace dit_runtime
