// A copy of the tests' bundle, to be damaged.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

// The stage of this name in a manifest.
inline nlohmann::json& stage(nlohmann::json& table, const std::string& name) {
    for (auto& entry : table["stages"])
        if (entry["name"] == name) return entry;
    throw std::out_of_range(name);
}

class BundleCopy {
  public:
    explicit BundleCopy(const std::string& bundle = BUNDLE) {
        static int number = 0;
        const std::string name = "dit-bundle-" + std::to_string(getpid()) + "-" + std::to_string(++number);
        folder = std::filesystem::temp_directory_path() / name;
        std::filesystem::copy(bundle, folder, std::filesystem::copy_options::recursive);
        manifest_ = bytes("manifest.json");
    }
    ~BundleCopy() {
        std::error_code ignored;
        std::filesystem::remove_all(folder, ignored);
    }
    BundleCopy(const BundleCopy&) = delete;
    BundleCopy& operator=(const BundleCopy&) = delete;

    std::string bytes(const std::string& name) const {
        std::ifstream file(folder / name, std::ios::binary);
        return {std::istreambuf_iterator<char>(file), {}};
    }
    void write(const std::string& name, const std::string& content) const {
        std::ofstream(folder / name, std::ios::binary) << content;
    }
    void edit(const std::function<void(nlohmann::json&)>& change) const {
        nlohmann::json table = nlohmann::json::parse(bytes("manifest.json"));
        change(table);
        write("manifest.json", table.dump());
    }
    void restore() const { write("manifest.json", manifest_); }

    std::filesystem::path folder;

  private:
    std::string manifest_;
};
