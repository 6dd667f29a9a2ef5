// Rows of a tensor as fp32, whatever their dtype.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "modxfer/ops.h"

namespace modxfer {

// Rows of a [M, D] tensor as fp32: in place for fp32, otherwise through the caller's buffer.
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : data_(static_cast<char*>(tensor.data_ptr())),
        stride_bytes_(tensor.stride(0) * static_cast<int64_t>(tensor.element_size())),
        width_(tensor.size(1)),
        dtype_(tensor.scalar_type()) {
    STD_TORCH_CHECK(tensor.dim() == 2 && (width_ == 1 || tensor.stride(1) == 1),
                    "rows: expected [M, D] with contiguous rows");
    STD_TORCH_CHECK(dtype_ == torch::headeronly::ScalarType::Float ||
                        dtype_ == torch::headeronly::ScalarType::BFloat16 ||
                        dtype_ == torch::headeronly::ScalarType::Half,
                    "rows: expected float32, bfloat16 or float16");
  }

  bool is_float() const { return dtype_ == torch::headeronly::ScalarType::Float; }
  int64_t buffer_size() const { return is_float() ? 0 : width_; }

  const float* read(int64_t row, float* buffer) const {
    if (is_float()) return at<float>(row);
    if (dtype_ == torch::headeronly::ScalarType::BFloat16) {
      std::copy_n(at<c10::BFloat16>(row), width_, buffer);
    } else {
      std::copy_n(at<c10::Half>(row), width_, buffer);
    }
    return buffer;
  }

  // Where to write a row; `commit` it afterwards.
  float* target(int64_t row, float* buffer) const { return is_float() ? at<float>(row) : buffer; }

  void commit(int64_t row, const float* buffer) const {
    if (dtype_ == torch::headeronly::ScalarType::BFloat16) {
      std::copy_n(buffer, width_, at<c10::BFloat16>(row));
    } else if (dtype_ == torch::headeronly::ScalarType::Half) {
      std::copy_n(buffer, width_, at<c10::Half>(row));
    }
  }

 private:
  template <class T>
  T* at(int64_t row) const {
    return reinterpret_cast<T*>(data_ + row * stride_bytes_);
  }

  char* data_;
  int64_t stride_bytes_;
  int64_t width_;
  torch::headeronly::ScalarType dtype_;
};

}  // namespace modxfer
