// Ed25519 of RFC 8032, its verification alone: not in constant time, for all that it reads is public.
// Mirrors dit_runtime/bundle/ed25519.py.
#pragma once

#include <array>
#include <string>

namespace dit_runtime::ed25519 {

using Key = std::array<unsigned char, 32>;
using Signature = std::array<unsigned char, 64>;

// Whether this is a signature of the message by the owner of the public key. The rule is libsodium's strict one: S is
// below L, the key and R are the one encoding of points whose order is not small, and [S]B = R + [k]A holds without a
// factor of 8. So nobody can change a signature into another one that is valid.
bool verify(const Key& key, const std::string& message, const Signature& signature);

}  // namespace dit_runtime::ed25519
