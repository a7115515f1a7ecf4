// A bundle's signature: manifest.sig, one line with an Ed25519 key and its signature of the bytes of manifest.json.
// Mirrors dit_runtime/bundle/signature.py.
#pragma once

#include <string>
#include <vector>

#include "manifest.hpp"

namespace dit_runtime {

inline const char* const SIGNATURE = "manifest.sig";

// Refuses a bundle unless the owner of the public key, 32 bytes, has signed this content of its manifest.
void require_signed(const Path& folder, const std::string& content, const std::vector<unsigned char>& key);

}  // namespace dit_runtime
