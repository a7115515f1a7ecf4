// The structs of dit.h as a program hands them over: each begins with its size.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "dit/dit.h"
#include "errors.hpp"

namespace dit_runtime {

inline void require(const void* pointer, const char* name) {
    if (!pointer) throw UsageError(text(name, " is NULL"));
}

// The sizes that the struct had in earlier versions of dit.h, the first one first: where their next field begins.
template <typename Struct>
const std::vector<std::size_t> versions = {};
template <>
inline const std::vector<std::size_t> versions<dit_open_options> = {
    offsetof(dit_open_options, warm), offsetof(dit_open_options, size), offsetof(dit_open_options, manifest_sha256),
    offsetof(dit_open_options, public_key)};
template <>
inline const std::vector<std::size_t> versions<dit_info> = {
    offsetof(dit_info, caption_shape),   offsetof(dit_info, state_rank), offsetof(dit_info, note),
    offsetof(dit_info, batch_invariant), offsetof(dit_info, steps),      offsetof(dit_info, num_sizes),
    offsetof(dit_info, frames)};
template <>
inline const std::vector<std::size_t> versions<dit_size> = {offsetof(dit_size, frames)};
template <>
inline const std::vector<std::size_t> versions<dit_request> = {
    offsetof(dit_request, captions), offsetof(dit_request, arrays), offsetof(dit_request, guidance_interval),
    offsetof(dit_request, preset),   offsetof(dit_request, size),   offsetof(dit_request, cancellation),
    offsetof(dit_request, image)};
template <>
inline const std::vector<std::size_t> versions<dit_captions> = {offsetof(dit_captions, size),
                                                                offsetof(dit_captions, mask_size)};

// The caller's struct; fields that its version lacks have our defaults.
template <typename Struct>
Struct known(const Struct* from, Struct defaults, const char* name) {
    require(from, name);
    const std::size_t size = from->struct_size;
    if (size > sizeof(Struct))
        throw UsageError(text(name, ".struct_size is ", size, ", but libdit ", dit_version(), " knows ", sizeof(Struct),
                              " bytes of it: the program needs a newer libdit"));
    const auto& before = versions<Struct>;
    if (size != sizeof(Struct) && std::find(before.begin(), before.end(), size) == before.end())
        throw UsageError(text(name, ".struct_size is ", size, "; start from the _INIT value of dit.h"));
    std::memcpy(&defaults, from, size);
    return defaults;
}

}  // namespace dit_runtime
