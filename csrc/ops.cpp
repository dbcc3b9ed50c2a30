// Every operator's schema, and nothing else. Kernels register themselves in csrc/cpu and csrc/cuda; fakes and autograd
// are Python's part (scrl_fast/ops). `float` in a schema is a C++ double, `int` an int64_t.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(scrl_fast, m) {
  m.def("ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum) -> ()");
}
