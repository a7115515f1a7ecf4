// dit.hpp: the C++ face of dit.h; header only, so it works with any compiler that libdit's C ABI works with.
//
//     dit::Pipeline pipe("first-bundle");
//     dit::Request request;
//     request.labels = {207, pipe.find_label("otter")};
//     const dit::Images images = pipe.generate(request);  // images.pixels: uint8 [2, height, width, 3]
//
// Failures are dit::Error with the status and the sentence of dit.h. Threads: as dit.h says.
#ifndef DIT_DIT_HPP
#define DIT_DIT_HPP

#include "dit/run.hpp"

#endif  // DIT_DIT_HPP
