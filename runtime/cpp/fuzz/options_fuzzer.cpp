// Options of dit_open, and words on the command line of dit-generate.
#include <fuzzer/FuzzedDataProvider.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "../programs/arguments.hpp"
#include "bundles.hpp"
#include "dit/dit.h"

namespace {

void parse(FuzzedDataProvider& data) {
    static const char* const flags[] = {"--labels",          "--guidance", "--seed",           "--guidance-interval",
                                        "--guidance-policy", "--cache",    "--cache-interval", "--steps",
                                        "--threads",         "--eta",      "--size",           "--condition",
                                        "--output",          "--backend",  "--low-memory",     "--verify",
                                        "--public-key",      "bundle"};
    std::vector<std::string> words = {"dit-generate"};
    while (data.remaining_bytes() && words.size() < 20)
        words.push_back(data.ConsumeBool() ? data.PickValueInArray(flags) : data.ConsumeRandomLengthString(20));
    std::vector<char*> pointers;
    for (std::string& word : words) pointers.push_back(word.data());
    try {
        parse_arguments(static_cast<int>(pointers.size()), pointers.data());
    } catch (const std::invalid_argument&) {
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* bytes, std::size_t length) {
    FuzzedDataProvider data(bytes, length);
    if (data.ConsumeBool()) {
        parse(data);
        return 0;
    }
    auto& all = fuzzed::bundles();
    const std::string folder = all[data.ConsumeIntegralInRange<std::size_t>(0, all.size() - 1)]->folder;
    const std::string backend = data.ConsumeRandomLengthString(12), device = data.ConsumeRandomLengthString(12);
    const std::string size = data.ConsumeRandomLengthString(12);
    const std::size_t count = data.ConsumeIntegralInRange<std::size_t>(0, 3);
    const auto warm = std::make_unique<int64_t[]>(count);
    for (std::size_t at = 0; at < count; ++at) warm[at] = data.PickValueInArray<int64_t>({1, 2, 3, 0, -1, INT64_MAX});
    dit_open_options options = DIT_OPEN_OPTIONS_INIT;
    options.backend = data.ConsumeBool() ? backend.c_str() : nullptr;
    options.device = data.ConsumeBool() ? device.c_str() : nullptr;
    options.threads = data.PickValueInArray({0, 1, 2, -1, INT32_MAX});
    options.low_memory = data.ConsumeBool();
    options.warm = warm.get();
    options.num_warm = count;
    options.size = data.ConsumeBool() ? size.c_str() : nullptr;
    const std::vector<uint8_t> key = data.ConsumeBytes<uint8_t>(data.ConsumeIntegralInRange<std::size_t>(0, 33));
    if (!key.empty()) {
        const std::string hex = "0123456789abcdef";
        std::string line = data.ConsumeRandomLengthString(210);
        if (line.empty()) {  // of the right form, and by this key
            line = "ed25519 ";
            for (std::size_t byte = 0; byte < 96; ++byte) {
                const uint8_t own = byte < 32 ? key[byte % key.size()] : data.ConsumeIntegral<uint8_t>();
                line += {hex[own >> 4], hex[own & 15]};
                if (byte == 31 || byte == 95) line += byte == 31 ? ' ' : '\n';
            }
        }
        std::ofstream(folder + "/manifest.sig", std::ios::binary) << line;
        options.public_key = key.data();
        options.public_key_size = key.size();
    }
    if (data.ConsumeBool()) options.struct_size = data.ConsumeIntegralInRange<std::size_t>(0, sizeof options + 9);
    dit_pipeline* const pipe = dit_new();
    const dit_status status = dit_open(pipe, folder.c_str(), &options);
    if (status == DIT_INTERNAL) std::abort();
    for (const char letter : std::string(dit_message(pipe)))
        if (static_cast<unsigned char>(letter) < 0x20) std::abort();
    dit_info info = DIT_INFO_INIT;
    dit_get_info(pipe, &info);
    dit_free(pipe);
    return 0;
}
