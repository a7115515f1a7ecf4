// Ed25519 against ed25519.json, which Python's tests read too, and what a signature's file may hold.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "ed25519.hpp"
#include "errors.hpp"
#include "signature.hpp"
#include "throws.hpp"

namespace dit_runtime {
namespace {

using Bytes = std::vector<unsigned char>;

Bytes unhex(const std::string& digits) {
    Bytes bytes;
    for (std::size_t i = 0; i < digits.size(); i += 2)
        bytes.push_back(static_cast<unsigned char>(std::stoi(digits.substr(i, 2), nullptr, 16)));
    return bytes;
}

template <typename Array>
Array array(const std::string& digits) {
    const Bytes bytes = unhex(digits);
    Array array;
    EXPECT_EQ(bytes.size(), array.size());
    std::copy_n(bytes.begin(), array.size(), array.begin());
    return array;
}

const nlohmann::json& vectors() {
    static const nlohmann::json table = nlohmann::json::parse(std::ifstream(ED25519));
    return table;
}

TEST(Ed25519, Vectors) {
    std::size_t valid = 0;
    for (const auto& vector : vectors()) {
        const Bytes message = unhex(vector["message"]);
        const bool verdict = ed25519::verify(array<ed25519::Key>(vector["key"]), {message.begin(), message.end()},
                                             array<ed25519::Signature>(vector["signature"]));
        EXPECT_EQ(verdict, vector["valid"].get<bool>()) << vector["name"];
        valid += verdict;
    }
    EXPECT_EQ(valid, 11u);
}

TEST(Signature, Files) {
    const auto& vector = vectors()[2];
    const std::string digits = vector["key"],
                      line = text("ed25519 ", digits, " ", std::string(vector["signature"]), "\n");
    const Bytes message = unhex(vector["message"]), key = unhex(digits);
    const std::string content(message.begin(), message.end());
    const Path folder = std::filesystem::temp_directory_path() / text("dit-signature-", getpid()),
               file = folder / SIGNATURE;
    std::filesystem::create_directories(folder);
    const auto check = [&](const std::string& written) {
        std::ofstream(file, std::ios::binary) << written;
        require_signed(folder, content, key);
    };
    throws<BundleError>("not signed: there is no manifest.sig", [&] { require_signed(folder, content, key); });
    check(line);
    for (const std::size_t size : {std::size_t{0}, std::size_t{31}, std::size_t{33}})
        throws<UsageError>(text("public_key has ", size, " bytes; expected 32"),
                           [&] { require_signed(folder, content, Bytes(size, key[0])); });
    throws<BundleError>("signed by the key " + digits + ", expected 0303",
                        [&] { require_signed(folder, content, Bytes(32, 3)); });
    throws<BundleError>("not the signature of this manifest.json", [&] { require_signed(folder, content + " ", key); });
    for (std::size_t size = 0; size < line.size(); ++size)
        throws<BundleError>("no signature; expected", [&] { check(line.substr(0, size)); });
    throws<BundleError>("203 bytes; expected at most 202", [&] { check(line + "\n"); });
    for (const auto& [place, letter] :
         {std::pair(0, 'E'), {7, '\t'}, {8, 'F'}, {9, ' '}, {72, '0'}, {73, 'g'}, {201, 'a'}, {100, '\0'}}) {
        std::string changed = line;
        changed[static_cast<std::size_t>(place)] = letter;
        throws<BundleError>("no signature; expected", [&] { check(changed); });
    }
    std::filesystem::rename(file, folder / "other");
    std::filesystem::create_symlink("other", file);
    throws<BundleError>("'manifest.sig' is a link", [&] { require_signed(folder, content, key); });
    std::filesystem::remove(file);
    std::filesystem::create_directory(file);
    throws<BundleError>("manifest.sig", [&] { require_signed(folder, content, key); });
    std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace dit_runtime
