// A list of tensors cut into chunks, so that one parallel loop covers all of them.
#pragma once
#include <cstdint>
#include <vector>

#include "tensor_lists.h"

namespace scrl {

// Elements a chunk: long enough that its start costs nothing, short enough to share a small network among many threads.
// Fixed, because norms are summed chunk by chunk: results do not depend on the number of threads.
constexpr int64_t kChunk = 1 << 14;

struct Chunk {
  int32_t tensor;
  int32_t count;
  int64_t begin;
};

inline std::vector<Chunk> chunks_of(const std::vector<Tensor>& tensors) {
  std::vector<Chunk> chunks;
  for (size_t k = 0; k < tensors.size(); ++k)
    for (int64_t begin = 0, size = tensors[k].numel(); begin < size; begin += kChunk)
      chunks.push_back({static_cast<int32_t>(k), static_cast<int32_t>(std::min(kChunk, size - begin)), begin});
  return chunks;
}

}  // namespace scrl
