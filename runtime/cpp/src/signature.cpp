#include "signature.hpp"

#include <optional>

#include "bundle_file.hpp"
#include "ed25519.hpp"
#include "errors.hpp"

namespace dit_runtime {
namespace {

constexpr std::size_t LENGTH = 202;  // of the line: "ed25519 KEY SIGNATURE\n"
constexpr std::size_t KEY = 8, SPACE = KEY + 64, OWN = SPACE + 1, END = OWN + 128;

template <typename Bytes>
std::string hex(const Bytes& bytes) {
    std::string digits;
    for (const unsigned char byte : bytes)
        for (const int half : {byte >> 4, byte & 15}) digits += "0123456789abcdef"[half];
    return digits;
}

// The bytes of lower-case digits; nothing where one is none.
template <typename Bytes>
std::optional<Bytes> unhex(const std::string& digits) {
    Bytes bytes;
    for (std::size_t i = 0; i < digits.size(); ++i) {
        const std::size_t half = std::string("0123456789abcdef").find(digits[i]);
        if (half == std::string::npos) return std::nullopt;
        bytes[i / 2] = static_cast<unsigned char>(i % 2 ? bytes[i / 2] | half : half << 4);
    }
    return bytes;
}

}  // namespace

void require_signed(const Path& folder, const std::string& content, const std::vector<unsigned char>& key) {
    if (key.size() != ed25519::Key().size())
        throw UsageError(text("public_key has ", key.size(), " bytes; expected ", ed25519::Key().size()));
    const Path path = folder / SIGNATURE;
    std::error_code failure;
    if (std::filesystem::symlink_status(path, failure).type() == std::filesystem::file_type::not_found)
        throw BundleError(text(folder.string(), ": not signed: there is no ", SIGNATURE,
                               " here; expected one as `dit-export sign` writes it"));
    const auto bytes = BundleFile(folder, SIGNATURE).read(LENGTH);
    const std::string line(bytes.begin(), bytes.end());
    std::optional<ed25519::Key> own;
    std::optional<ed25519::Signature> signature;
    if (line.size() == LENGTH && line.substr(0, KEY) == "ed25519 " && line[SPACE] == ' ' && line[END] == '\n') {
        own = unhex<ed25519::Key>(line.substr(KEY, SPACE - KEY));
        signature = unhex<ed25519::Signature>(line.substr(OWN, END - OWN));
    }
    if (!own || !signature)
        throw BundleError(
            text(path.string(), ": no signature; expected `ed25519 KEY SIGNATURE`, as `dit-export sign` writes it"));
    if (!ed25519::verify(*own, content, *signature))
        throw BundleError(text(path.string(),
                               ": not the signature of this manifest.json: one of the two was changed; after tune or "
                               "compile, sign the bundle again"));
    if (!std::equal(key.begin(), key.end(), own->begin()))
        throw BundleError(text(path.string(), ": signed by the key ", hex(*own), ", expected ", hex(key)));
}

}  // namespace dit_runtime
