// What the KD rows compute, from the numbers of an op.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "modxfer/kd_loss.h"
#include "modxfer/ops.h"

namespace modxfer {

// A spec, the parts of a weighted sum that it points to, and what rows have of their own.
class Spec {
 public:
  // divergences: one, or several of a weighted sum. numbers: temperature, kd_weight, ce_weight,
  // label_smoothing, z_loss_weight, then weight and c0 to c3 of each divergence. classes: of a row.
  // softening: [rows, 2], each row's temperature and a factor of its kd_weight, or nothing.
  Spec(const std::vector<int64_t>& divergences, const std::vector<double>& numbers, int64_t classes,
       const std::optional<Tensor>& softening = std::nullopt, int64_t rows = 0) {
    STD_TORCH_CHECK(!divergences.empty() && numbers.size() == 5 + 5 * divergences.size(),
                    "divergences, numbers: expected five numbers, and five of each divergence");
    const auto number = [&](size_t i) { return static_cast<float>(numbers[i]); };
    for (size_t k = 0; k < divergences.size(); ++k) {
      STD_TORCH_CHECK(0 <= divergences[k] && divergences[k] < kNumDivergences,
                      "divergences: expected those that these C++ kernels were built with");
      const size_t i = 5 + 5 * k;
      parts_.push_back({static_cast<Divergence>(divergences[k]), number(i), number(i + 1),
                        number(i + 2), number(i + 3), number(i + 4)});
    }
    for (const KdSummand& part : parts_) {
      STD_TORCH_CHECK(parts_.size() == 1 || static_cast<int64_t>(part.divergence) < kNumSums,
                      "divergences: expected sums over the classes as parts of a sum");
    }
    const KdSummand& first = parts_[0];
    const auto divergence = parts_.size() == 1 ? first.divergence : Divergence::kCount;
    spec_ = {divergence,
             first.c0,
             first.c1,
             first.c2,
             first.c3,
             static_cast<float>(1.0 / numbers[0]),
             static_cast<float>(kLog2E / numbers[0]),
             number(1),
             number(2),
             number(3),
             number(4),
             static_cast<float>(classes),
             parts_.data(),
             static_cast<int64_t>(parts_.size())};
    if (!softening.has_value()) return;
    STD_TORCH_CHECK(softening->scalar_type() == torch::headeronly::ScalarType::Float &&
                        softening->is_contiguous() && softening->dim() == 2 &&
                        softening->size(0) == rows && softening->size(1) == 2,
                    "softening: expected contiguous float32 [M, 2]");
    softening_ = static_cast<const float*>(softening->data_ptr());
  }

  operator const KdSpec&() const { return spec_; }

  KdSpec of_row(int64_t row) const {
    KdSpec own = spec_;
    if (softening_ != nullptr) {
      const double temperature = softening_[2 * row];
      own.inv_temperature = static_cast<float>(1.0 / temperature);
      own.rate = static_cast<float>(kLog2E / temperature);
      own.kd_weight *= softening_[2 * row + 1];
    }
    return own;
  }

 private:
  static constexpr double kLog2E = 1.4426950408889634;
  std::vector<KdSummand> parts_;
  KdSpec spec_;
  const float* softening_ = nullptr;
};

}  // namespace modxfer
