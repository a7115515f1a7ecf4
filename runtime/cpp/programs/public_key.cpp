#include "public_key.hpp"

#include <cctype>
#include <fstream>
#include <stdexcept>

namespace {

const std::string BEGIN = "-----BEGIN PUBLIC KEY-----", END = "-----END PUBLIC KEY-----";
// A key's DER, as RFC 8410 has it, begins with this; the 32 bytes of the key follow.
const std::vector<unsigned char> DER = {0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00};
constexpr std::size_t KEY = 32, DIGITS = 59;  // of 44 bytes in Base64, before one "="

// The bytes of so many digits of Base64; empty where one is none.
std::vector<unsigned char> from_base64(const std::string& digits) {
    const std::string known = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::vector<unsigned char> bytes;
    unsigned bits = 0;
    int count = 0;
    for (const char digit : digits) {
        const std::size_t value = known.find(digit);
        if (value == std::string::npos) return {};
        bits = (bits << 6 | static_cast<unsigned>(value)) & 0xffff;
        count += 6;
        if (count < 8) continue;
        count -= 8;
        bytes.push_back(static_cast<unsigned char>(bits >> count & 0xff));
    }
    return bytes;
}

}  // namespace

std::vector<unsigned char> read_public_key(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string content(4096, '\0');
    file.read(content.data(), static_cast<std::streamsize>(content.size()));
    if (!file.eof()) throw std::invalid_argument(path + ": cannot be read as a key");
    content.resize(static_cast<std::size_t>(file.gcount()));
    std::string packed;
    for (const char letter : content)
        if (!std::isspace(static_cast<unsigned char>(letter)) || letter == ' ') packed += letter;
    std::vector<unsigned char> der;
    if (packed.size() == BEGIN.size() + DIGITS + 1 + END.size() && packed.rfind(BEGIN, 0) == 0 &&
        packed.substr(BEGIN.size() + DIGITS) == "=" + END)
        der = from_base64(packed.substr(BEGIN.size(), DIGITS));
    if (der.size() != DER.size() + KEY || !std::equal(DER.begin(), DER.end(), der.begin()))
        throw std::invalid_argument(path + ": no Ed25519 key; expected " + BEGIN + ", as openssl writes it");
    return {der.begin() + static_cast<std::ptrdiff_t>(DER.size()), der.end()};
}
