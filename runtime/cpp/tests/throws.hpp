// Refusals by their words.
#pragma once

#include <gtest/gtest.h>

#include <string>

namespace dit_runtime {

// What the call throws says these words.
template <typename Error, typename Call>
void throws(const std::string& words, const Call& call) {
    try {
        call();
        ADD_FAILURE() << "not refused: " << words;
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
}

}  // namespace dit_runtime
