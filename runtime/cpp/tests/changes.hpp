// Manifests with a change, as far as their text goes.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <string>

#include "bundle.hpp"
#include "errors.hpp"
#include "manifest.hpp"

namespace dit_runtime {

inline Manifest changed_manifest(const char* bundle, const std::function<void(nlohmann::json&)>& change) {
    nlohmann::json table = nlohmann::json::parse(std::ifstream(std::string(bundle) + "/manifest.json"));
    change(table);
    return parse(table.dump(), "changed");
}

// The change is refused with a sentence that holds these words.
inline void refused_change(const char* bundle, const std::string& words,
                           const std::function<void(nlohmann::json&)>& change) {
    try {
        changed_manifest(bundle, change);
        ADD_FAILURE() << "not refused: " << words;
    } catch (const BundleError& error) {
        EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
    }
}

}  // namespace dit_runtime
