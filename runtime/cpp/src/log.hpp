// The lines that the library writes for the program's log; nothing is printed.
#pragma once

#include <functional>
#include <string>

namespace dit_runtime {

enum class Severity { ERROR, WARNING, INFO, DEBUG };

// Any thread calls it, several at the same time; it must not throw.
using OnLog = std::function<void(Severity severity, const std::string& line)>;

// Lines of this severity and graver ones go there, each as one printable line; an empty function: nowhere.
void set_log(OnLog on_log, Severity least);

using Log = void(Severity severity, const std::string& line);
Log log;

}  // namespace dit_runtime
