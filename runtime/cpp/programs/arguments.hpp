// The command line of dit-generate: the flags of `dit-run sample`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "dit/dit.hpp"

struct Arguments {
    std::string bundle;
    dit::OpenOptions open;
    std::vector<std::string> labels;
    dit::Request request;                          // but for labels and what files hold
    std::string latents;                           // a .npy file to start from
    std::vector<std::string> condition, negative;  // NAME=FILE.npy, NAME=FILE.txt …, or FILE.npz
    std::vector<std::string> image, mask;          // .png files: one, or one a picture
    std::optional<std::string> public_key;         // a .pem file
    std::string output = "sample.png";
    bool json = false, quiet = false, verify = false, help = false, version = false;
};

extern const char* const USAGE;

// Throws std::invalid_argument with one sentence.
Arguments parse_arguments(int count, char** words);
