#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cuda/ema_update_kernels.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"

namespace {
using namespace scrl;
using namespace scrl::cuda;
using namespace scrl::ema_lists;

template <class T>
void launch(const Table& table, const Number& momentum, const Tensor& any) {
  const int blocks = resident_blocks(any, kBlocks, table.first_chunk[table.count]);
  ema_kernel<T><<<blocks, kThreads, 0, stream_of(any)>>>(table, momentum);
  check_launch("ema_update_");
}

void launch_any(ScalarType dtype, Table& table, const Number& momentum, const Tensor& any) {
  if (table.count == 0) return;
  if (dtype == ScalarType::Float) launch<float>(table, momentum, any);
  if (dtype == ScalarType::Double) launch<double>(table, momentum, any);
  if (dtype == ScalarType::BFloat16) launch<__nv_bfloat16>(table, momentum, any);
  if (dtype == ScalarType::Half) launch<__half>(table, momentum, any);
  table.count = 0;
}

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum,
                 std::optional<Tensor> momentum_tensor) {
  visit_ema_lists(targets, sources, momentum_tensor, [](const auto&...) {});
  check_on_gpu(targets, "ema_update_");
  check_on_gpu(sources, "ema_update_");
  if (targets.empty()) return;
  const Number number = number_of(momentum, momentum_tensor, 1, 0, device_of(targets[0]), "ema_update_");
  if (!number.tensor && number.factor == 1) return;
  const torch::stable::accelerator::DeviceGuard guard(targets[0].get_device_index());

  Table table;
  for (ScalarType dtype : {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    table.count = 0;
    for (size_t k = 0; k < targets.size(); ++k) {
      if (floating_dtype(targets[k]) != dtype || targets[k].numel() == 0) continue;
      if (table.count == 0) table.first_chunk[0] = 0;
      const Item item{targets[k].mutable_data_ptr(), sources[k].const_data_ptr(), targets[k].numel()};
      table.first_chunk[table.count + 1] =
          table.first_chunk[table.count] + static_cast<int>((item.size + kChunk - 1) / kChunk);
      table.items[table.count++] = item;
      if (table.count == Table::kCapacity) launch_any(dtype, table, number, targets[0]);
    }
    launch_any(dtype, table, number, targets[0]);
  }
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scrl_fast, CUDA, m) { m.impl("ema_update_", TORCH_BOX(&ema_update_)); }
