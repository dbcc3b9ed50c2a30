// Passes of BatchNorm [+ residual] [+ ReLU] over a block of rows, for every dtype and width of vectors.
#pragma once
#include <cstdint>

#include "check.h"

namespace scrl::norm {

// A map [N, C, H, W] in channels_last, or [N, C], is rows of C adjacent channels. Values a channel have the
// accumulation dtype and lie in arrays of `padded` numbers, a whole number of the widest vectors, with zeros behind C.
struct Pass {
  const void *input, *residual, *output, *grad;  // [rows, channels]
  void* result;                                  // [rows, channels]
  const void *mean, *scale, *bias;               // [padded]; scale = weight / sqrt(var + eps)
  const void *slope, *offset;                    // [padded], of backward
  void* partials;                                // [blocks, 2, padded]
  int64_t rows, channels, padded, rows_a_block;
  bool relu;
};

using Run = void (*)(const Pass& pass, int64_t first_block, int64_t last_block);

// partials: mean and summed squared deviations of each block.
Run statistics_of(ScalarType dtype);
// result = act((input - mean) * scale + bias + residual); residual may be null.
Run apply_of(ScalarType dtype);
// partials: sums of dy and dy * (input - mean) of each block, where dy is the gradient before the ReLU. The ReLU's mask
// is that of output, or is computed again where output is null. result = dy, unless it is null.
Run backward_sums_of(ScalarType dtype);
// result = dy * scale - (input - mean) * slope - offset, dy as above with the mask computed again.
Run backward_of(ScalarType dtype);

}  // namespace scrl::norm
