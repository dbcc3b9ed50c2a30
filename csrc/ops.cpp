// Every operator's schema, and nothing else. Kernels register themselves in csrc/cpu and csrc/cuda; fakes and autograd
// are Python's part (scrl_fast/ops). `float` in a schema is a C++ double, `int` an int64_t.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(scrl_fast, m) {
  m.def("ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, Tensor? momentum_tensor=None) -> ()");
  m.def(
      "lars_step_(Tensor(a!)[] params, Tensor(b!)[] momentum_buffers, Tensor(c!)[] ema_targets, Tensor[] grads, "
      "int[] ema_places, float[] settings, int[] setting_of, float ema_momentum, Tensor? lr, Tensor? momentum, "
      "Tensor? ema_momentum_tensor, Tensor(d!)? skip_counter) -> ()");
  m.def(
      "roi_align(Tensor input, Tensor boxes, float spatial_scale, int pooled_height, int pooled_width, "
      "int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "roi_align_backward(Tensor grad, Tensor boxes, float spatial_scale, int sampling_ratio, bool aligned, "
      "SymInt[] size, bool channels_last) -> Tensor");
  m.def(
      "roi_align_backward_out(Tensor grad, Tensor boxes, float spatial_scale, int sampling_ratio, bool aligned, "
      "Tensor(a!) out) -> ()");
  m.def(
      "normalized_mse_loss(Tensor input, Tensor target, bool two_views, int reduction, bool grad_input, "
      "bool grad_target) -> (Tensor, Tensor, Tensor)");
}
