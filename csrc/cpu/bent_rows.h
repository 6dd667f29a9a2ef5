// Rows of logits as a model gives them: with the bias of its head, bent where it bends them.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "modxfer/bend.h"
#include "rows.h"

namespace modxfer {

// The pair of `KDSpec.bends` and `KDSpec.biases`: four numbers of student and teacher, or none; a
// bias of each or of one, or none.
struct Bends {
  Bends(const std::vector<double>& numbers, const Biases& biases, int64_t vocab_size) {
    if (!numbers.empty()) {
      STD_TORCH_CHECK(numbers.size() == 4, "bends: expected no number, or two a side");
      student = {static_cast<float>(numbers[0]), static_cast<float>(numbers[1])};
      teacher = {static_cast<float>(numbers[2]), static_cast<float>(numbers[3])};
    }
    if (biases.empty()) return;
    STD_TORCH_CHECK(biases.size() == 2, "biases: expected none, or one or no bias a side");
    student.bias = floats_of(biases[0], vocab_size);
    teacher.bias = floats_of(biases[1], vocab_size);
  }

  Bend student, teacher;

 private:
  static const float* floats_of(const std::optional<Tensor>& bias, int64_t vocab_size) {
    if (!bias.has_value()) return nullptr;
    STD_TORCH_CHECK(bias->scalar_type() == torch::headeronly::ScalarType::Float &&
                        bias->is_contiguous() && bias->numel() == vocab_size,
                    "biases: expected contiguous float32, one entry a class");
    return static_cast<const float*>(bias->data_ptr());
  }
};

// Rows that pass through the caller's buffer where they do not stay what the head gives.
class BentRows {
 public:
  BentRows(const Tensor& tensor, const Bend& bend)
      : rows_(tensor), width_(tensor.size(1)), bend_(bend), kernels_(bend_row_kernels()) {}

  int64_t buffer_size() const { return bend_.is_identity() ? rows_.buffer_size() : width_; }

  const float* read(int64_t row, float* buffer) const {
    const float* given = rows_.read(row, buffer);
    if (bend_.is_identity()) return given;
    kernels_.bend(given, width_, bend_, buffer);
    return buffer;
  }

  // A gradient in the row z that `read` gave becomes one in the row of the head.
  void unbend(const float* z, float* gradient) const {
    if (!bend_.is_straight()) kernels_.unbend(z, width_, bend_, gradient);
  }

 private:
  Rows rows_;
  int64_t width_;
  Bend bend_;
  const BendRowKernels& kernels_;
};

}  // namespace modxfer
