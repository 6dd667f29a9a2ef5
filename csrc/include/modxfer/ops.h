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

// Of the heads of student and teacher, [V] each where they have one; or none.
using Biases = std::vector<std::optional<Tensor>>;

// Instruction sets by their place in modxfer/isa.h: whether this processor has one, the one in
// use, and another from now on, while no op runs.
bool has_instruction_set(int64_t index);
int64_t instruction_set();
void use_instruction_set(int64_t index);

// -> kd [M], ce [M], stats [M, 6]; divergences, numbers: those of Spec, bends: none or two a side,
// biases: none or one or no bias a side;
// softening: [M, 2], each row's temperature and a factor of its kd_weight, where they have any;
// writes extras, KdExtras of rows [M, 6] or their first number alone [M, 1], where given
std::tuple<Tensor, Tensor, Tensor> kd_loss_fwd(
    Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
    std::vector<int64_t> divergences, std::vector<double> numbers, std::vector<double> bends,
    Biases biases, std::optional<Tensor> softening, std::optional<Tensor> extras);

// writes dlogits [M, V]
void kd_loss_bwd(Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
                 Tensor row_weights, Tensor stats, std::vector<int64_t> divergences,
                 std::vector<double> numbers, std::vector<double> bends, Biases biases,
                 std::optional<Tensor> softening, Tensor dlogits);

// both for one row while it is in cache -> kd [M], ce [M]
std::tuple<Tensor, Tensor> kd_loss_fwd_bwd(Tensor student_logits, Tensor teacher_logits,
                                           std::optional<Tensor> labels, Tensor row_weights,
                                           std::vector<int64_t> divergences,
                                           std::vector<double> numbers, std::vector<double> bends,
                                           Biases biases, std::optional<Tensor> softening,
                                           Tensor dlogits, std::optional<Tensor> extras);

// -> ce [M]; writes extras [M, 1] or [M, 4] where given: log sum e^z, the label's log-probability,
// whether it is the largest, entropy; bends: none or two a side, of which the student's are read
Tensor cross_entropy_fwd(Tensor logits, std::optional<Tensor> labels, double ce_weight,
                         double label_smoothing, double z_loss_weight, std::vector<double> bends,
                         Biases biases, std::optional<Tensor> extras);

// the same, and writes dlogits [M, V], which may be logits
Tensor cross_entropy_fwd_bwd(Tensor logits, std::optional<Tensor> labels, Tensor row_weights,
                             double ce_weight, double label_smoothing, double z_loss_weight,
                             std::vector<double> bends, Biases biases, Tensor dlogits,
                             std::optional<Tensor> extras);

// the same in stages, of rows whose classes several ranks share: statistics, sums, dlogits; labels
// in [0, V], V for a class of another rank
Tensor kd_loss_stats(Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
                     std::vector<int64_t> divergences, std::vector<double> numbers,
                     std::vector<double> bends, Biases biases, std::optional<Tensor> softening,
                     bool has_more);
Tensor kd_loss_sums(Tensor student_logits, Tensor teacher_logits, Tensor stats,
                    std::vector<int64_t> divergences, std::vector<double> numbers,
                    std::vector<double> bends, Biases biases, std::optional<Tensor> softening);
void kd_loss_write(Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
                   int64_t classes, Tensor row_weights, Tensor stats,
                   std::vector<int64_t> divergences, std::vector<double> numbers,
                   std::vector<double> bends, Biases biases, std::optional<Tensor> softening,
                   Tensor dlogits);

// of a teacher that lists ids [M, K] -> kd [M], ce [M]; writes dlogits [M, V] where given, and
// log sum exp of the student to extras [M, 1]
std::tuple<Tensor, Tensor> topk_kd_loss(
    Tensor student_logits, Tensor ids, Tensor log_probs, std::optional<Tensor> log_tail,
    int64_t tail, double missing, std::optional<Tensor> labels, std::optional<Tensor> row_weights,
    std::vector<int64_t> divergences, std::vector<double> numbers, std::vector<double> bends,
    Biases biases, std::optional<Tensor> softening, std::optional<Tensor> dlogits,
    std::optional<Tensor> extras);

// -> ids [M, k] int32, log_probs [M, k], log_tail [M] of a teacher's logits, whose bend is read
std::tuple<Tensor, Tensor, Tensor> teacher_topk(Tensor logits, int64_t k, std::vector<double> bends,
                                                double temperature);

// -> loss [M]; writes dz [M, D] where given, which may be z
Tensor projection_loss_rows(Tensor z, Tensor t, Tensor row_weights, int64_t loss, double beta,
                            int64_t norm, double norm_eps, std::optional<Tensor> dz);

// the same of z = hidden projection_a^T projection^T + bias, which is not stored: writes losses
// [M] and the gradients that are given, all in rows `kept` alone where that is given
void projection_loss_low_rank(Tensor hidden, Tensor teacher, Tensor projection, Tensor projection_a,
                              std::optional<Tensor> bias, Tensor row_weights,
                              std::optional<Tensor> kept, int64_t loss, double beta, int64_t norm,
                              double norm_eps, Tensor losses, std::optional<Tensor> dhidden,
                              std::optional<Tensor> dprojection,
                              std::optional<Tensor> dprojection_a, std::optional<Tensor> dbias);

// -> scale x lora_a^T [M, R] fp32
Tensor lora_shrink(Tensor x, Tensor lora_a, double scale);

// writes bits [T, M, ceil(K / 32)] where given, s [M, sum R] and ys = bias + residual + s B^T
void lora_linear_rows_fwd(Tensor x, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                          Biases biases, std::optional<Tensor> residual, std::vector<double> scales,
                          std::vector<int64_t> thresholds, std::optional<Tensor> seed,
                          std::optional<Tensor> bits, Tensor s, std::vector<Tensor> ys);

// writes dx = sum of mask(ds A), da and db, each where given
void lora_linear_rows_bwd(std::vector<Tensor> dys, std::optional<Tensor> x,
                          std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                          std::vector<double> scales, std::vector<int64_t> thresholds,
                          std::optional<Tensor> s, std::optional<Tensor> bits,
                          std::optional<Tensor> dx, std::vector<std::optional<Tensor>> da,
                          std::vector<std::optional<Tensor>> db);

// writes centred [N, D] = x - shift, 0 where mask is false; sums [2, D] += sums and squares of it
void correlation_centre(Tensor x, std::optional<Tensor> mask, Tensor shift, Tensor centred,
                        Tensor sums);

// total [M, D] += tile
void correlation_add(Tensor tile, Tensor total);

}  // namespace modxfer
