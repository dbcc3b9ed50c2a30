// A list of tensors cut into chunks, so that one parallel loop covers all of them.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/vectorize.h"
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

// items: one a tensor, with its count of elements.
template <class Item>
std::vector<Chunk> chunks_of(const std::vector<Item>& items) {
  std::vector<Chunk> chunks;
  chunks.reserve(2 * items.size());
  for (size_t k = 0; k < items.size(); ++k)
    for (int64_t begin = 0, size = items[k].count; begin < size; begin += kChunk)
      chunks.push_back({static_cast<int32_t>(k), static_cast<int32_t>(std::min(kChunk, size - begin)), begin});
  return chunks;
}

// run(c) for the chunks c of [first, last), backwards if asked. Each thread has a share of neighbours, so that it reads
// memory in order and a second loop over the same chunks finds in a core's cache what the first left there. A thread
// that is done helps the others: loader processes share these cores, and a thread that lost its core would hold up all
// of them. A thread more for every 32 k elements.
template <class Run>
void for_each_chunk(const std::vector<Chunk>& chunks, int64_t first, int64_t last, bool backwards, const Run& run) {
  int64_t elements = 0;
  for (int64_t c = first; c < last; ++c) elements += chunks[c].count;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + elements / (2 * kChunk));
  const auto start = [&](int64_t share) { return first + (last - first) * share / threads; };
  std::vector<std::atomic<int64_t>> taken(threads);  // chunks of each share
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t turn = begin; turn < end + threads - 1; ++turn) {
      const int64_t share = turn % threads, low = start(share), size = start(share + 1) - low;
      for (int64_t i; (i = taken[share].fetch_add(1, std::memory_order_relaxed)) < size;)
        run(backwards ? low + size - 1 - i : low + i);
    }
  });
}

// Asks for the line that a loop over `at` will need a page of 4 KB later: the processor's own prefetchers stop at page
// ends. Measured on Sapphire Rapids, one thread: 20.1 -> 23.1 GB/s for the moving average.
template <class T>
SCRL_INLINE void prefetch_page_ahead(const T* at) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const char*>(at) + 4096);
#endif
}

}  // namespace scrl
