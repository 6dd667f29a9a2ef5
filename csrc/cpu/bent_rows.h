// Rows of logits as a model gives them, bent where it bends them.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "modxfer/bend.h"
#include "rows.h"

namespace modxfer {

// The pair of `KDSpec.bends`: four numbers of student and teacher, or none.
struct Bends {
  explicit Bends(const std::vector<double>& numbers) {
    if (numbers.empty()) return;
    STD_TORCH_CHECK(numbers.size() == 4, "bends: expected no number, or two a side");
    student = {static_cast<float>(numbers[0]), static_cast<float>(numbers[1])};
    teacher = {static_cast<float>(numbers[2]), static_cast<float>(numbers[3])};
  }

  Bend student, teacher;
};

// Rows that pass through the caller's buffer, bent, where their model bends them.
class BentRows {
 public:
  BentRows(const Tensor& tensor, const Bend& bend)
      : rows_(tensor), width_(tensor.size(1)), bend_(bend), kernels_(bend_row_kernels()) {}

  int64_t buffer_size() const { return bend_.is_identity() ? rows_.buffer_size() : width_; }

  const float* read(int64_t row, float* buffer) const {
    const float* raw = rows_.read(row, buffer);
    if (bend_.is_identity()) return raw;
    kernels_.bend(raw, width_, bend_, buffer);
    return buffer;
  }

  // A gradient in the row z that `read` gave becomes one in the raw row.
  void unbend(const float* z, float* gradient) const {
    if (!bend_.is_identity()) kernels_.unbend(z, width_, bend_, gradient);
  }

 private:
  Rows rows_;
  int64_t width_;
  Bend bend_;
  const BendRowKernels& kernels_;
};

}  // namespace modxfer
