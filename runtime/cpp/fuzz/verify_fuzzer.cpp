// Verifies a bundle whose reference is damaged: an array has other numbers, another kind or another shape, or is gone.
// With a first byte of 255 the rest is the file. Whatever it holds, the answer is figures or a refusal.
#include <fuzzer/FuzzedDataProvider.h>
#include <unistd.h>

#include "bundles.hpp"
#include "errors.hpp"
#include "verify.hpp"

namespace dit = dit_runtime;

namespace {

void damage(fuzzed::Arrays& arrays, FuzzedDataProvider& data) {
    while (data.remaining_bytes() && !arrays.empty()) {
        auto entry = arrays.begin();
        std::advance(entry, data.ConsumeIntegralInRange<std::size_t>(0, arrays.size() - 1));
        dit::NpyArray& array = entry->second;
        switch (data.ConsumeIntegralInRange<int>(0, 4)) {
            case 0: {  // 8 bytes at a place
                const auto bytes = data.ConsumeBytes<unsigned char>(8);
                const std::size_t at =
                    data.ConsumeIntegral<std::uint32_t>() % std::max<std::size_t>(1, array.bytes.size());
                for (std::size_t i = 0; i < bytes.size() && at + i < array.bytes.size(); ++i)
                    array.bytes[at + i] = bytes[i];
                break;
            }
            case 1: {  // numbers of another kind, as many of them
                const std::size_t size = array.size();
                array.kind = data.PickValueInArray({"f2", "f4", "f8", "i4", "i8", "u1", "b1"});
                array.bytes.assign(size * static_cast<std::size_t>(array.kind[1] - '0'),
                                   data.ConsumeIntegral<unsigned char>());
                break;
            }
            case 2: {  // another shape, with the bytes that it needs
                array.shape.resize(data.ConsumeIntegralInRange<std::size_t>(0, 5));
                for (auto& size : array.shape) size = data.ConsumeIntegralInRange<std::int64_t>(0, 9);
                array.bytes.resize(dit::count(array.shape) * static_cast<std::size_t>(array.kind[1] - '0'), 1);
                break;
            }
            case 3: {  // one number in all places
                const double value = data.PickValueInArray({0.0, -1.0, 1e300, std::nan(""), HUGE_VAL, -1e-300, 1e38});
                array.kind = "f8";
                array = fuzzed::array_of<double>(array.shape, value);
                break;
            }
            default:
                arrays.erase(entry);
        }
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* bytes, std::size_t size) {
    if (!size) return 0;
    FuzzedDataProvider data(bytes + 1, size - 1);
    auto& all = fuzzed::bundles();
    fuzzed::Bundle& bundle = *all[data.ConsumeIntegralInRange<std::size_t>(0, all.size() - 1)];
    std::string content;
    if (bytes[0] == 255) {
        content = data.ConsumeRemainingBytesAsString();
    } else {
        fuzzed::Arrays arrays = bundle.reference();
        damage(arrays, data);
        content = fuzzed::npz(arrays);
    }
    bundle.write("reference.npz", content);
    bundle.write_manifest();
    try {
        dit::Pipeline pipe(bundle.folder, {});
        dit::verify(pipe, [](const dit::Figure& figure) { dit::one_line(figure.name() + figure.where); });
    } catch (const dit::UsageError&) {
    } catch (const dit::EngineError&) {
    }
    return 0;
}
