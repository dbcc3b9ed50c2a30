#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <optional>
#include <vector>

#include "cuda/lars_step_kernels.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "lars_lists.h"

namespace {
using namespace scrl;
using namespace scrl::cuda;
using namespace scrl::lars;

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
  const auto nothing = [](const auto&...) {};
  visit_lars_lists(params, momentum_buffers, ema_targets, grads, ema_places, settings, setting_of,
                   {lr, momentum, ema_momentum_tensor, skip_counter}, nothing, nothing);
  for (const auto* list : {&params, &momentum_buffers, &ema_targets, &grads}) check_on_gpu(*list, "lars_step_");
  if (skip_counter) check_on_gpu({*skip_counter}, "lars_step_");
  if (params.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());

  const auto* given = reinterpret_cast<const LarsSettings*>(settings.data());
  std::vector<LarsSettings> rows(given, given + settings.size() / kLarsSettings);
  const auto count = static_cast<int64_t>(rows.size());
  const int device = device_of(params[0]);
  Numbers numbers;
  for (int64_t row = 0; row < count; ++row) {  // numbers on the host go into the rows
    numbers.lr = number_of(1, lr, count, row, device, "lars_step_");
    numbers.momentum = number_of(1, momentum, count, row, device, "lars_step_");
    if (!numbers.lr.tensor) rows[row].lr *= std::exchange(numbers.lr.factor, 1);
    if (!numbers.momentum.tensor) rows[row].momentum *= std::exchange(numbers.momentum.factor, 1);
  }
  numbers.ema_momentum = number_of(ema_momentum, ema_momentum_tensor, 1, 0, device, "lars_step_");
  std::vector<void*> targets(params.size(), nullptr);
  if (numbers.ema_momentum.tensor || numbers.ema_momentum.factor != 1)
    for (size_t k = 0; k < ema_targets.size(); ++k) targets[ema_places[k]] = ema_targets[k].mutable_data_ptr();

  std::vector<Tables> groups;
  for (ScalarType dtype : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    groups.emplace_back(dtype);
    for (size_t k = 0; k < params.size(); ++k)
      if (floating_dtype(params[k]) == dtype && params[k].numel() > 0)
        groups.back().add({params[k].mutable_data_ptr(), momentum_buffers[k].mutable_data_ptr(), targets[k],
                           grads[k].const_data_ptr(), params[k].numel(), 0},
                          setting_of[k], rows[setting_of[k]]);
  }
  run(groups, numbers, skip_counter, params[0]);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CUDA, m) { m.impl("lars_step_", TORCH_BOX(&lars_step_)); }
