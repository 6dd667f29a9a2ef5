// Labels of rows of logits.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "modxfer/ops.h"

namespace modxfer {

// -1 for a label outside [0, V), which means no cross entropy, and for all where there are none.
class Labels {
 public:
  Labels(const std::optional<Tensor>& labels, int64_t rows, int64_t vocab_size)
      : vocab_size_(vocab_size) {
    if (!labels.has_value()) return;
    STD_TORCH_CHECK(
        labels->scalar_type() == torch::headeronly::ScalarType::Long && labels->numel() == rows,
        "labels: expected int64, one a row");
    data_ = static_cast<const int64_t*>(labels->data_ptr());
    stride_ = labels->stride(0);
  }

  int64_t operator[](int64_t row) const {
    if (data_ == nullptr) return -1;
    const int64_t label = data_[row * stride_];
    return 0 <= label && label < vocab_size_ ? label : -1;
  }

 private:
  const int64_t* data_ = nullptr;
  int64_t stride_ = 0;
  int64_t vocab_size_;
};

}  // namespace modxfer
