// Runs the kernels of csrc/cuda/{ema_update,lars_step}_kernels.h over lists of tensors and compares them with plain
// loops; says what differs and returns 1.
#include <cstring>
#include <random>
#include <string>

#include "cuda/ema_update_kernels.h"
#include "cuda/lars_step_kernels.h"

using namespace scrl;
using namespace scrl::cuda;
using cuda_on_cpu::launch;

namespace {
bool failed = false;

void expect(bool good, const std::string& what) {
  if (!good) std::printf("%s\n", what.c_str());
  failed |= !good;
}

// Sizes below, at and above packs and chunks.
const std::vector<int64_t> kSizes = {1, 7, 8, 300, kChunk, kChunk + 5, 3 * kChunk - 1};

// One memory block a tensor, so that the sanitizer sees where it ends; `offset` elements in, so that packs are
// misaligned.
template <class T>
struct List {
  std::vector<std::vector<T>> memory;
  int offset;

  List(int seed, int offset, double scale) : offset(offset) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t size : kSizes) {
      memory.emplace_back(size + offset);
      for (T& value : memory.back()) value = narrow<T>(static_cast<accumulate_t<T>>(scale * normal(random)));
    }
  }
  T* at(size_t k) { return memory[k].data() + offset; }
  bool operator==(const List& other) const {
    for (size_t k = 0; k < memory.size(); ++k)
      if (std::memcmp(memory[k].data(), other.memory[k].data(), memory[k].size() * sizeof(T)) != 0) return false;
    return true;
  }
};

template <class T>
double tolerance() {
  return sizeof(T) == 8 ? 1e-13 : sizeof(T) == 4 ? 1e-5 : 2e-2;
}

template <class T>
void compare(List<T>& made, const std::vector<std::vector<double>>& wanted, const std::string& what) {
  double worst = 0;
  for (size_t k = 0; k < wanted.size(); ++k)
    for (size_t i = 0; i < wanted[k].size(); ++i)
      worst = std::max(worst, std::abs(widen(made.at(k)[i]) - wanted[k][i]) / (1 + std::abs(wanted[k][i])));
  expect(worst <= tolerance<T>(), what + " differs by " + std::to_string(worst));
}

template <class Table>
void cut(Table& table) {
  table.first_chunk[0] = 0, table.count = static_cast<int>(kSizes.size());
  for (int k = 0; k < table.count; ++k)
    table.first_chunk[k + 1] = table.first_chunk[k] + static_cast<int>((kSizes[k] + kChunk - 1) / kChunk);
}

template <class T>
void check_ema(const std::string& dtype, int offset, double momentum) {
  List<T> sources(1, offset, 1), first(2, offset, 1);
  for (int blocks : {1, 5}) {
    List<T> targets(2, offset, 1);
    std::vector<std::vector<double>> wanted;
    ema_lists::Table table{};
    cut(table);
    for (size_t k = 0; k < kSizes.size(); ++k) {
      table.items[k] = {targets.at(k), sources.at(k), kSizes[k]};
      wanted.emplace_back();
      for (int64_t i = 0; i < kSizes[k]; ++i)
        wanted[k].push_back(momentum * widen(targets.at(k)[i]) + (1 - momentum) * widen(sources.at(k)[i]));
    }
    const Number number{momentum};
    launch(blocks, kThreads, [&] { ema_lists::ema_kernel<T>(table, number); });
    const std::string what = "ema " + dtype + " offset " + std::to_string(offset);
    compare(targets, wanted, what);
    if (blocks == 1) first = targets;
    expect(targets == first, what + ": bits depend on the number of blocks");
  }
}

template <class T>
void check_lars(const std::string& dtype, int offset, bool non_finite) {
  using lars::Numbers;
  const std::vector<LarsSettings> settings = {{0.5, 0.9, 1e-2, 1e-3, 1e-8, 1, kAdapt},
                                              {0.25, 0.8, 0, 1e-3, 1e-8, 0.5, 0},
                                              {0.125, 0.9, 1e-2, 1e-3, 1e-8, 1, kPlainByLr}};
  const double ema_momentum = 0.75;
  List<T> grads(3, offset, 0.1), first(4, offset, 1);
  if (non_finite) grads.at(3)[17] = narrow<T>(INFINITY);
  for (int blocks : {1, 5}) {
    List<T> params(4, offset, 1), buffers(5, offset, 1), targets(6, offset, 1);
    List<T> old = params;
    std::vector<std::vector<double>> wanted_params, wanted_buffers, wanted_targets;
    auto table = std::make_unique<lars::Table>();
    cut(*table);
    table->row_count = static_cast<int>(settings.size());
    for (int row = 0; row < table->row_count; ++row) table->rows[row] = {settings[row], row};
    for (size_t k = 0; k < kSizes.size(); ++k) {
      const int row = static_cast<int>(k % settings.size());
      const bool has_target = k != 2;
      table->items[k] = {params.at(k), buffers.at(k), has_target ? targets.at(k) : nullptr,
                         grads.at(k),  kSizes[k],     row};
      double p2 = 0, g2 = 0;
      for (int64_t i = 0; i < kSizes[k]; ++i) {
        p2 += std::pow(widen(params.at(k)[i]), 2), g2 += std::pow(widen(grads.at(k)[i]), 2);
      }
      const LarsSettings& s = settings[row];
      const double pn = std::sqrt(p2), gn = std::sqrt(g2);
      const double ratio = s.trust_coefficient * pn / (gn + s.weight_decay * pn + s.eps);
      const double gradient = s.mode == kAdapt ? ratio : s.mode == kPlainByLr ? s.lr : s.grad_scale;
      const double decay = s.mode == kAdapt ? ratio * s.weight_decay : s.weight_decay;
      for (auto* list : {&wanted_params, &wanted_buffers, &wanted_targets}) list->emplace_back();
      for (int64_t i = 0; i < kSizes[k]; ++i) {
        const double p = widen(params.at(k)[i]), t = widen(targets.at(k)[i]);
        const double b = s.momentum * widen(buffers.at(k)[i]) + gradient * widen(grads.at(k)[i]) + decay * p;
        wanted_buffers[k].push_back(b), wanted_params[k].push_back(p - s.lr * b);
        wanted_targets[k].push_back(has_target ? ema_momentum * t + (1 - ema_momentum) * (p - s.lr * b) : t);
      }
    }
    const int chunks = table->first_chunk[table->count];
    std::vector<double2> partials(chunks, {NAN, NAN});
    std::vector<int> finite(blocks, -1);
    const lars::Workspace workspace{partials.data(), finite.data(), blocks};
    const Numbers numbers{{}, {}, {ema_momentum}};
    int64_t skipped = 0;
    launch(blocks, kThreads, [&] { lars::squares_kernel<T>(*table, workspace); });
    launch(blocks, kThreads, [&] { lars::update_kernel<T>(*table, workspace, numbers, &skipped, true); });
    const std::string what = "lars " + dtype + " offset " + std::to_string(offset);
    expect(skipped == non_finite, what + ": counted " + std::to_string(skipped) + " skipped steps");
    if (non_finite) {
      expect(params == old, what + ": a skipped step changed parameters");
      continue;
    }
    compare(params, wanted_params, what + " parameters");
    compare(buffers, wanted_buffers, what + " buffers");
    compare(targets, wanted_targets, what + " targets");
    if (blocks == 1) first = params;
    expect(params == first, what + ": bits depend on the number of blocks");
  }
}

template <class T>
void check(const std::string& dtype) {
  for (int offset : {0, 1}) {
    check_ema<T>(dtype, offset, 0.97);
    check_ema<T>(dtype, offset, 0.25);
    check_lars<T>(dtype, offset, false);
  }
  check_lars<T>(dtype, 0, true);
}
}  // namespace

int main() {
  check<float>("float32");
  check<double>("float64");
  check<__nv_bfloat16>("bfloat16");  // float16 differs in its rounding only
  return failed;
}
