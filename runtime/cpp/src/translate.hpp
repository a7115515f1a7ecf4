// From the structs of dit.h to a request.
#pragma once

#include "dit/dit.h"
#include "request.hpp"

namespace dit_runtime {

// The caller's request, with the number of its pictures in `count`.
dit_request counted(const dit_request* from);

// The request with its numbers copied; each array's length is checked before it is read.
Request translate(const Manifest& manifest, const dit_request* from);

}  // namespace dit_runtime
