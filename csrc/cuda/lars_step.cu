#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "cuda/chunks.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "ema_update.h"
#include "lars_step.h"

namespace {
using namespace scrl;
using namespace scrl::cuda;

// Blocks a multiprocessor: 768 or 1,024 threads, each with up to four loads of 16 bytes in flight, and no spills. A
// pack of eight 16-bit elements needs more registers.
template <class T>
constexpr int kBlocks = sizeof(T) == 2 ? 3 : 4;

struct Item {
  void *param, *buffer, *target;  // target: null where there is none
  const void* gradient;
  int64_t size;
  int row;
};

struct Row {
  LarsSettings settings;
  int place;  // among the numbers that live on the GPU
};

struct Table {
  static constexpr int kRows = kArgumentBytes / 640;
  static constexpr int kCapacity = (kArgumentBytes - kRows * 64 - 256) / 52;
  Item items[kCapacity];
  Row rows[kRows];
  int first_chunk[kCapacity + 1];
  int count, row_count;
  int first_partial, first_block;  // of this table's chunks and blocks among those of all tables
};

// Between the two kernels: sums of squares of each chunk, and whether each block saw only finite gradients.
struct Workspace {
  double2* partials;  // (parameters, gradients)
  int* finite;
  int blocks;
};

struct Numbers {
  Number lr, momentum, ema_momentum;
};
static_assert(sizeof(Table) + sizeof(Workspace) + sizeof(Numbers) + 16 <= kArgumentBytes);

// Sum over the block in a fixed order; valid in thread 0.
__device__ __forceinline__ double2 block_sum(double2 value) {
  __shared__ double2 warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value.x += __shfl_down_sync(0xffffffffu, value.x, offset);
    value.y += __shfl_down_sync(0xffffffffu, value.y, offset);
  }
  __syncthreads();  // the sums of the call before have been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) {
      value.x += warps[warp].x;
      value.y += warps[warp].y;
    }
  return value;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    squares_kernel(const __grid_constant__ Table table, const Workspace workspace) {
  const Share share = share_of_block(table.first_chunk[table.count]);
  int k = tensor_of_chunk(table.first_chunk, table.count, share.begin);
  bool finite = true;  // of thread 0
  for (int chunk = share.begin; chunk < share.end; ++chunk) {
    while (chunk >= table.first_chunk[k + 1]) ++k;
    const Item& item = table.items[k];
    const auto [begin, count] = chunk_of(chunk - table.first_chunk[k], item.size);
    const T* params = static_cast<const T*>(item.param) + begin;
    const T* gradients = static_cast<const T*>(item.gradient) + begin;
    double2 sum = {0, 0};
    for_each_pack<T>(count, all_aligned(params, gradients), [&](int i, auto width) {
      const auto param = load<width>(params + i);
      const auto gradient = load<width>(gradients + i);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const double p = widen(param.values[j]), g = widen(gradient.values[j]);
        sum.x += p * p;
        sum.y += g * g;
      }
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) workspace.partials[table.first_partial + chunk] = sum;
    finite = finite && isfinite(sum.y);
  }
  if (threadIdx.x == 0) workspace.finite[table.first_block + blockIdx.x] = finite;
}

template <class T>
__device__ __forceinline__ LarsFactors<accumulate_t<T>> factors_of(const Table& table, int k,
                                                                   const Workspace& workspace, const Numbers& numbers) {
  using A = accumulate_t<T>;
  __shared__ LarsFactors<A> shared;
  double2 sum = {0, 0};
  for (int chunk = table.first_chunk[k] + threadIdx.x; chunk < table.first_chunk[k + 1]; chunk += kThreads) {
    const double2 partial = workspace.partials[table.first_partial + chunk];
    sum.x += partial.x;
    sum.y += partial.y;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    const Row& row = table.rows[table.items[k].row];
    LarsSettings settings = row.settings;
    settings.lr *= numbers.lr.at(row.place);
    settings.momentum *= numbers.momentum.at(row.place);
    shared = lars_factors<A>(settings, sum.x, sum.y);
  }
  __syncthreads();
  return shared;
}

template <class T, bool with_target>
__device__ __forceinline__ void update_chunk(const Item& item, Chunk chunk, const LarsFactors<accumulate_t<T>>& factors,
                                             const EmaFactors<accumulate_t<T>>& toward) {
  T* params = static_cast<T*>(item.param) + chunk.begin;
  T* buffers = static_cast<T*>(item.buffer) + chunk.begin;
  T* targets = with_target ? static_cast<T*>(item.target) + chunk.begin : nullptr;
  const T* gradients = static_cast<const T*>(item.gradient) + chunk.begin;
  for_each_pack<T>(chunk.count, all_aligned(params, buffers, targets, gradients), [&](int i, auto width) {
    auto param = load<width>(params + i), buffer = load<width>(buffers + i);
    const auto gradient = load<width>(gradients + i);
    Pack<T, width> target;
    if constexpr (with_target) target = load<width>(targets + i);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      auto p = widen(param.values[j]), b = widen(buffer.values[j]);
      lars_update(p, widen(gradient.values[j]), b, factors);
      param.values[j] = narrow<T>(p);
      buffer.values[j] = narrow<T>(b);
      if constexpr (with_target) {
        auto t = widen(target.values[j]);
        ema(t, widen(param.values[j]), toward);  // the parameter as it was rounded
        target.values[j] = narrow<T>(t);
      }
    }
    store(params + i, param);
    store(buffers + i, buffer);
    if constexpr (with_target) store(targets + i, target);
  });
}

// counter: int32 or int64, or null where steps are never skipped.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    update_kernel(const __grid_constant__ Table table, const Workspace workspace,
                  const __grid_constant__ Numbers numbers, void* counter, bool wide_counter) {
  if (counter) {
    bool bad = false;
    for (int block = threadIdx.x; block < workspace.blocks; block += kThreads) bad |= !workspace.finite[block];
    if (__syncthreads_or(bad)) {
      if (table.first_block == 0 && blockIdx.x == 0 && threadIdx.x == 0) {
        if (wide_counter)
          ++*static_cast<int64_t*>(counter);
        else
          ++*static_cast<int32_t*>(counter);
      }
      return;
    }
  }
  const auto toward = ema_factors<accumulate_t<T>>(numbers.ema_momentum.at(0));
  const Share share = share_of_block(table.first_chunk[table.count]);
  int k = table.count;
  LarsFactors<accumulate_t<T>> factors;
  // Backwards: what the first kernel read last is still in the second-level cache, 50 MB on an H100.
  for (int chunk = share.end - 1; chunk >= share.begin; --chunk) {
    if (k == table.count || chunk < table.first_chunk[k]) {
      k = tensor_of_chunk(table.first_chunk, table.count, chunk);
      factors = factors_of<T>(table, k, workspace, numbers);
    }
    const Item& item = table.items[k];
    const Chunk part = chunk_of(chunk - table.first_chunk[k], item.size);
    if (item.target && !toward.keep)
      update_chunk<T, true>(item, part, factors, toward);
    else
      update_chunk<T, false>(item, part, factors, toward);
  }
}

// Tensors of one dtype, cut into as few tables as hold them.
class Tables {
 public:
  explicit Tables(ScalarType dtype) : dtype(dtype) {}

  void add(Item item, int64_t row, const LarsSettings& settings) {
    if (tables.empty() || tables.back()->count == Table::kCapacity) start();
    if ((item.row = row_in_table(row)) < 0) {
      if (tables.back()->row_count == Table::kRows) start();
      Table& table = *tables.back();
      item.row = table.row_count++;
      table.rows[item.row] = {settings, static_cast<int>(row)};
    }
    Table& table = *tables.back();
    const int64_t chunks = (item.size + kChunk - 1) / kChunk;
    table.first_chunk[table.count + 1] = table.first_chunk[table.count] + static_cast<int>(chunks);
    table.items[table.count++] = item;
  }

  ScalarType dtype;
  std::vector<std::unique_ptr<Table>> tables;

 private:
  void start() { tables.push_back(std::make_unique<Table>()); }
  int row_in_table(int64_t row) const {
    const Table& table = *tables.back();
    for (int i = 0; i < table.row_count; ++i)
      if (table.rows[i].place == row) return i;
    return -1;
  }
};

template <class T>
struct Launch {
  static int blocks(const Table& table, const Tensor& any) {
    return resident_blocks(any, kBlocks<T>, table.first_chunk[table.count]);
  }
  static void squares(const Table& table, const Workspace& workspace, int blocks, cudaStream_t stream) {
    squares_kernel<T><<<blocks, kThreads, 0, stream>>>(table, workspace);
  }
  static void update(const Table& table, const Workspace& workspace, const Numbers& numbers, void* counter,
                     bool wide_counter, int blocks, cudaStream_t stream) {
    update_kernel<T><<<blocks, kThreads, 0, stream>>>(table, workspace, numbers, counter, wide_counter);
  }
};

template <class Call>
void with_type(ScalarType dtype, const Call& call) {
  if (dtype == ScalarType::Float) call(Launch<float>{});
  if (dtype == ScalarType::Double) call(Launch<double>{});
  if (dtype == ScalarType::BFloat16) call(Launch<__nv_bfloat16>{});
  if (dtype == ScalarType::Half) call(Launch<__half>{});
}

// Gives every table its place in the workspace; returns the numbers of chunks and blocks.
std::pair<int64_t, int64_t> lay_out(std::vector<Tables>& groups, const Tensor& any) {
  int64_t chunks = 0, blocks = 0;
  for (Tables& group : groups)
    for (auto& table : group.tables) {
      table->first_partial = static_cast<int>(chunks);
      table->first_block = static_cast<int>(blocks);
      chunks += table->first_chunk[table->count];
      with_type(group.dtype, [&](auto launch) { blocks += launch.blocks(*table, any); });
    }
  return {chunks, blocks};
}

void run(std::vector<Tables>& groups, const Numbers& numbers, const std::optional<Tensor>& skip_counter,
         const Tensor& any) {
  const auto [chunks, blocks] = lay_out(groups, any);
  if (chunks == 0) return;
  const std::vector<int64_t> bytes = {chunks * static_cast<int64_t>(sizeof(double2)) + blocks * 4};
  Tensor memory = torch::stable::new_empty(any, bytes, ScalarType::Byte);
  auto* partials = static_cast<double2*>(memory.mutable_data_ptr());
  const Workspace workspace{partials, reinterpret_cast<int*>(partials + chunks), static_cast<int>(blocks)};
  void* counter = skip_counter ? skip_counter->mutable_data_ptr() : nullptr;
  const bool wide_counter = skip_counter && skip_counter->scalar_type() == ScalarType::Long;
  const cudaStream_t stream = stream_of(any);
  for (bool update : {false, true})
    for (Tables& group : groups)
      for (auto& table : group.tables)
        with_type(group.dtype, [&](auto launch) {
          const int grid = launch.blocks(*table, any);
          if (update)
            launch.update(*table, workspace, numbers, counter, wide_counter, grid, stream);
          else
            launch.squares(*table, workspace, grid, stream);
          check_launch("lars_step_");
        });
}

void lars_step_(std::vector<Tensor> params, std::vector<Tensor> momentum_buffers, std::vector<Tensor> ema_targets,
                std::vector<Tensor> grads, std::vector<int64_t> ema_places, std::vector<double> settings,
                std::vector<int64_t> setting_of, double ema_momentum, std::optional<Tensor> lr,
                std::optional<Tensor> momentum, std::optional<Tensor> ema_momentum_tensor,
                std::optional<Tensor> skip_counter) {
  check_lars_lists(params, momentum_buffers, ema_targets, grads, ema_places, settings, setting_of);
  for (const auto* list : {&params, &momentum_buffers, &ema_targets, &grads}) check_on_gpu(*list, "lars_step_");
  if (skip_counter) check_on_gpu({*skip_counter}, "lars_step_");
  if (params.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());

  const auto* given = reinterpret_cast<const LarsSettings*>(settings.data());
  std::vector<LarsSettings> rows(given, given + settings.size() / kLarsSettings);
  const auto count = static_cast<int64_t>(rows.size());
  Numbers numbers;
  for (int64_t row = 0; row < count; ++row) {  // numbers on the host go into the rows
    numbers.lr = number_of(1, lr, count, row, "lars_step_");
    numbers.momentum = number_of(1, momentum, count, row, "lars_step_");
    if (!numbers.lr.tensor) rows[row].lr *= std::exchange(numbers.lr.factor, 1);
    if (!numbers.momentum.tensor) rows[row].momentum *= std::exchange(numbers.momentum.factor, 1);
  }
  numbers.ema_momentum = number_of(ema_momentum, ema_momentum_tensor, 1, 0, "lars_step_");
  std::vector<void*> targets(params.size(), nullptr);
  if (numbers.ema_momentum.tensor || numbers.ema_momentum.factor != 1)
    for (size_t k = 0; k < ema_targets.size(); ++k) targets[ema_places[k]] = ema_targets[k].mutable_data_ptr();

  std::vector<Tables> groups;
  for (ScalarType dtype : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    groups.emplace_back(dtype);
    for (size_t k = 0; k < params.size(); ++k)
      if (params[k].scalar_type() == dtype && params[k].numel() > 0)
        groups.back().add({params[k].mutable_data_ptr(), momentum_buffers[k].mutable_data_ptr(), targets[k],
                           grads[k].const_data_ptr(), params[k].numel(), 0},
                          setting_of[k], rows[setting_of[k]]);
  }
  run(groups, numbers, skip_counter, params[0]);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CUDA, m) { m.impl("lars_step_", TORCH_BOX(&lars_step_)); }
