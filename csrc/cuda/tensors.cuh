// Tensors as arguments of a kernel, and what CUDA says of its launch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "modxfer/ops.h"
#include "row_in_registers.cuh"

namespace modxfer::cuda {

inline Kind kind_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Kind::kFloat;
    case ScalarType::BFloat16:
      return Kind::kBf16;
    case ScalarType::Half:
      return Kind::kHalf;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

inline Matrix matrix_of(const Tensor& rows) {
  return {rows.data_ptr(), rows.stride(0), kind_of(rows)};
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();  // else CUTLASS takes it for its launch's own
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

template <class T>
T* at(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

inline Tensor new_floats(const Tensor& like, const std::vector<int64_t>& size) {
  return torch::stable::new_empty(like, size, torch::headeronly::ScalarType::Float);
}

}  // namespace modxfer::cuda
