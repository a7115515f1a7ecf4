// The boundary of a program, where errors become a line and an exit code. Mirrors console.py.
#pragma once

#include <exception>
#include <string>

constexpr int FAILED = 1, REFUSED = 2, BUG = 70;  // stopped or failed a gate; bad usage or bad input; a bug of ours

// The text as JSON has it, in quotes.
std::string json_text(const std::string& text);

// REFUSED where the user or a file is at fault, else BUG.
int exit_code(const std::exception& error);

// Prints the error as a line, and with --json among the words as an object on standard output too; returns its code.
int report(const std::string& program, const std::exception& error, int code, int count, char** words);
