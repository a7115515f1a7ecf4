// The file of --public-key.
#pragma once

#include <string>
#include <vector>

// The 32 bytes of an Ed25519 key in PEM, as openssl writes it; throws std::invalid_argument with one sentence.
std::vector<unsigned char> read_public_key(const std::string& path);
