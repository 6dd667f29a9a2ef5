// The compiled ops, as register.cpp registers them. Shapes are checked by the Python ops above
// them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

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

// -> loss [M]; writes dz [M, D] where given, which may be z
Tensor projection_loss_rows(Tensor z, Tensor t, Tensor row_weights, int64_t loss, double beta,
                            int64_t norm, double norm_eps, std::optional<Tensor> dz);

// -> scale x lora_a^T [M, R] fp32
Tensor lora_shrink(Tensor x, Tensor lora_a, double scale);

// writes bits [T, M, ceil(K / 32)] where given, s [M, sum R] and ys = bias + residual + s B^T
void lora_linear_rows_fwd(Tensor x, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                          std::vector<std::optional<Tensor>> biases, std::optional<Tensor> residual,
                          std::vector<double> scales, std::vector<int64_t> thresholds,
                          std::optional<Tensor> seed, std::optional<Tensor> bits, Tensor s,
                          std::vector<Tensor> ys);

// writes dx = sum of mask(ds A), da and db, each where given
void lora_linear_rows_bwd(std::vector<Tensor> dys, std::optional<Tensor> x,
                          std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                          std::vector<double> scales, std::vector<int64_t> thresholds,
                          std::optional<Tensor> s, std::optional<Tensor> bits,
                          std::optional<Tensor> dx, std::vector<std::optional<Tensor>> da,
                          std::vector<std::optional<Tensor>> db);

}  // namespace modxfer
