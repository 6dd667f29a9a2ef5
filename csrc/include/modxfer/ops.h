// The compiled ops, as register.cpp registers them. Shapes are checked by the Python ops above
// them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace modxfer {

using torch::stable::Tensor;

// -> kd [M], ce [M], stats [M, 6]
std::tuple<Tensor, Tensor, Tensor> kd_loss_fwd(Tensor student_logits, Tensor teacher_logits,
                                               std::optional<Tensor> labels, int64_t divergence,
                                               double beta, double temperature, double kd_weight,
                                               double ce_weight);

// writes dlogits [M, V]
void kd_loss_bwd(Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
                 Tensor row_weights, Tensor stats, int64_t divergence, double beta,
                 double temperature, double kd_weight, double ce_weight, Tensor dlogits);

// both for one row while it is in cache -> kd [M], ce [M]
std::tuple<Tensor, Tensor> kd_loss_fwd_bwd(Tensor student_logits, Tensor teacher_logits,
                                           std::optional<Tensor> labels, Tensor row_weights,
                                           int64_t divergence, double beta, double temperature,
                                           double kd_weight, double ce_weight, Tensor dlogits);

}  // namespace modxfer
