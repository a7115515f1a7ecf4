// The structs of dit.h as a program hands them over: each begins with its size.
#pragma once

#include <cstddef>
#include <cstring>

#include "dit/dit.h"
#include "errors.hpp"

namespace dit_runtime {

inline void require(const void* pointer, const char* name) {
    if (!pointer) throw UsageError(text(name, " is NULL"));
}

// The size of each struct in its first version; newer fields follow.
template <typename Struct>
constexpr std::size_t first_version = sizeof(Struct);
template <>
constexpr std::size_t first_version<dit_open_options> = offsetof(dit_open_options, warm);
template <>
constexpr std::size_t first_version<dit_info> = offsetof(dit_info, caption_shape);
template <>
constexpr std::size_t first_version<dit_request> = offsetof(dit_request, captions);
template <>
constexpr std::size_t first_version<dit_captions> = offsetof(dit_captions, size);

// The caller's struct; fields that its version lacks have our defaults.
template <typename Struct>
Struct known(const Struct* from, Struct defaults, const char* name) {
    require(from, name);
    const std::size_t size = from->struct_size;
    if (size < first_version<Struct> || size % alignof(Struct))  // no version ends inside of a field
        throw UsageError(text(name, ".struct_size is ", size, "; start from the _INIT value of dit.h"));
    if (size > sizeof(Struct))
        throw UsageError(text(name, ".struct_size is ", size, ", but libdit ", dit_version(), " knows ", sizeof(Struct),
                              " bytes of it: the program needs a newer libdit"));
    std::memcpy(&defaults, from, size);
    return defaults;
}

}  // namespace dit_runtime
