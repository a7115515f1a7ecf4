// Parses a bundle's manifest, or NumPy's files if the input begins like one. Whatever the bytes, the answer is a value
// or the one exception that the caller expects.
#include "errors.hpp"
#include "manifest.hpp"
#include "npy.hpp"
#include "solvers.hpp"

namespace dit = dit_runtime;

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
    if (size && (data[0] == 0x93 || data[0] == 'P')) {
        try {
            const std::vector<unsigned char> content(data, data + size);
            data[0] == 'P' ? dit::parse_npz(content).size() : dit::parse_npy(content).size();
        } catch (const dit::NpyError&) {
        }
        return 0;
    }
    try {
        const dit::Manifest manifest = dit::parse({data, data + size}, "fuzzed");
        for (const auto& file : manifest.files) {
            try {
                dit::inside("/nowhere", file.first);
            } catch (const dit::BundleError&) {
            }
        }
        if (manifest.process.train_steps > 5000) return 0;  // right, but slow
        for (const auto& solver : dit::SOLVERS) {
            try {
                dit::plan(manifest.process, solver, 10);
                if (dit::contains(dit::NOISE_SOLVERS, solver)) dit::make_schedule(manifest.process, solver, 10);
            } catch (const dit::UsageError&) {
            }
        }
    } catch (const dit::BundleError&) {
    }
    return 0;
}
