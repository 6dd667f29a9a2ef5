// All compiled schemas. The namespace is apart from the public ops, which are defined in Python and
// choose among backends.

#include <torch/csrc/stable/library.h>

#include "modxfer/ops.h"

STABLE_TORCH_LIBRARY(modxfer_csrc, m) {
  m.def("has_instruction_set(int index) -> bool");
  m.def("instruction_set() -> int");
  m.def("use_instruction_set(int index) -> ()");
  m.def(
      "kd_loss_fwd(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "int[] divergences, float[] numbers, float[] bends, Tensor?[] biases, Tensor? softening, "
      "Tensor(a!)? extras) -> (Tensor kd, Tensor ce, Tensor stats)");
  m.def(
      "kd_loss_bwd(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "Tensor row_weights, Tensor stats, int[] divergences, float[] numbers, float[] bends, "
      "Tensor?[] biases, Tensor? softening, Tensor(a!) dlogits) -> ()");
  m.def(
      "kd_loss_fwd_bwd(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "Tensor row_weights, int[] divergences, float[] numbers, float[] bends, Tensor?[] biases, "
      "Tensor? softening, Tensor(a!) dlogits, Tensor(b!)? extras) -> (Tensor kd, Tensor ce)");
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor? labels, float ce_weight, float label_smoothing, "
      "float z_loss_weight, float[] bends, Tensor?[] biases, Tensor(a!)? extras) -> Tensor ce");
  m.def(
      "cross_entropy_fwd_bwd(Tensor logits, Tensor? labels, Tensor row_weights, float ce_weight, "
      "float label_smoothing, float z_loss_weight, float[] bends, Tensor?[] biases, Tensor(a!) "
      "dlogits, Tensor(b!)? extras) -> Tensor ce");
  m.def(
      "kd_loss_stats(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "int[] divergences, float[] numbers, float[] bends, Tensor?[] biases, Tensor? softening, "
      "bool has_more) -> Tensor parts");
  m.def(
      "kd_loss_sums(Tensor student_logits, Tensor teacher_logits, Tensor stats, "
      "int[] divergences, float[] numbers, float[] bends, Tensor?[] biases, Tensor? softening) "
      "-> Tensor sums");
  m.def(
      "kd_loss_write(Tensor student_logits, Tensor teacher_logits, Tensor? labels, int classes, "
      "Tensor row_weights, Tensor stats, int[] divergences, float[] numbers, float[] bends, "
      "Tensor?[] biases, Tensor? softening, Tensor(a!) dlogits) -> ()");
  m.def(
      "topk_kd_loss(Tensor student_logits, Tensor ids, Tensor log_probs, Tensor? log_tail, "
      "int tail, float missing, Tensor? labels, Tensor? row_weights, int[] divergences, "
      "float[] numbers, float[] bends, Tensor?[] biases, Tensor? softening, Tensor(a!)? dlogits, "
      "Tensor(b!)? extras) -> (Tensor kd, Tensor ce)");
  m.def(
      "teacher_topk(Tensor logits, int k, float[] bends, float temperature) -> (Tensor ids, Tensor "
      "log_probs, Tensor log_tail)");
  m.def(
      "projection_loss_rows(Tensor z, Tensor t, Tensor row_weights, int loss, float beta, int "
      "norm, "
      "float norm_eps, Tensor(a!)? dz) -> Tensor loss");
  m.def(
      "projection_loss_low_rank(Tensor hidden, Tensor teacher, Tensor projection, "
      "Tensor projection_a, Tensor? bias, Tensor row_weights, Tensor? kept, int loss, float beta, "
      "int norm, float norm_eps, Tensor(a!) losses, Tensor(b!)? dhidden, Tensor(c!)? dprojection, "
      "Tensor(d!)? dprojection_a, Tensor(e!)? dbias) -> ()");
  m.def("lora_shrink(Tensor x, Tensor lora_a, float scale) -> Tensor s");
  m.def(
      "lora_linear_rows_fwd(Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor?[] biases, "
      "Tensor? residual, float[] scales, int[] thresholds, Tensor? seed, "
      "Tensor(a!)? bits, Tensor(b!) s, Tensor(c!)[] ys) -> ()");
  m.def(
      "lora_linear_rows_bwd(Tensor[] dys, Tensor? x, Tensor[] lora_a, Tensor[] lora_b, "
      "float[] scales, int[] thresholds, Tensor? s, Tensor? bits, Tensor(a!)? dx, "
      "Tensor?[] da, Tensor?[] db) -> ()");
  m.def(
      "correlation_centre(Tensor x, Tensor? mask, Tensor shift, Tensor(a!) centred, "
      "Tensor(b!) sums) -> ()");
  m.def("correlation_add(Tensor tile, Tensor(a!) total) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CompositeExplicitAutograd, m) {
  m.impl("has_instruction_set", TORCH_BOX(&modxfer::has_instruction_set));
  m.impl("instruction_set", TORCH_BOX(&modxfer::instruction_set));
  m.impl("use_instruction_set", TORCH_BOX(&modxfer::use_instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CPU, m) {
  m.impl("kd_loss_fwd", TORCH_BOX(&modxfer::kd_loss_fwd));
  m.impl("kd_loss_bwd", TORCH_BOX(&modxfer::kd_loss_bwd));
  m.impl("kd_loss_fwd_bwd", TORCH_BOX(&modxfer::kd_loss_fwd_bwd));
  m.impl("kd_loss_stats", TORCH_BOX(&modxfer::kd_loss_stats));
  m.impl("kd_loss_sums", TORCH_BOX(&modxfer::kd_loss_sums));
  m.impl("kd_loss_write", TORCH_BOX(&modxfer::kd_loss_write));
  m.impl("topk_kd_loss", TORCH_BOX(&modxfer::topk_kd_loss));
  m.impl("teacher_topk", TORCH_BOX(&modxfer::teacher_topk));
  m.impl("cross_entropy_fwd", TORCH_BOX(&modxfer::cross_entropy_fwd));
  m.impl("cross_entropy_fwd_bwd", TORCH_BOX(&modxfer::cross_entropy_fwd_bwd));
  m.impl("projection_loss_rows", TORCH_BOX(&modxfer::projection_loss_rows));
  m.impl("projection_loss_low_rank", TORCH_BOX(&modxfer::projection_loss_low_rank));
  m.impl("lora_shrink", TORCH_BOX(&modxfer::lora_shrink));
  m.impl("lora_linear_rows_fwd", TORCH_BOX(&modxfer::lora_linear_rows_fwd));
  m.impl("lora_linear_rows_bwd", TORCH_BOX(&modxfer::lora_linear_rows_bwd));
  m.impl("correlation_centre", TORCH_BOX(&modxfer::correlation_centre));
  m.impl("correlation_add", TORCH_BOX(&modxfer::correlation_add));
}
