// The exit code of an error: 1 failed or stopped, 2 bad usage or bad input, 70 a bug. Mirrors CODES of console.py.
#pragma once

#include <new>
#include <stdexcept>

constexpr int FAILED = 1, REFUSED = 2, BUG = 70;

inline int exit_code(const std::exception& error) {
    const bool refused = dynamic_cast<const std::runtime_error*>(&error) ||
                         dynamic_cast<const std::invalid_argument*>(&error) ||
                         dynamic_cast<const std::bad_alloc*>(&error);
    return refused ? REFUSED : BUG;
}
