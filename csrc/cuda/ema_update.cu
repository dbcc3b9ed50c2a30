#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
