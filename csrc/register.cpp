// All compiled schemas. The namespace is apart from the public ops, which are defined in Python and
// choose among backends.

#include <torch/csrc/stable/library.h>

#include "modxfer/ops.h"

STABLE_TORCH_LIBRARY(modxfer_csrc, m) {
  m.def(
      "kd_loss_fwd(Tensor student_logits, Tensor teacher_logits, Tensor? labels, int divergence, "
      "float beta, float temperature, float kd_weight, float ce_weight) "
      "-> (Tensor kd, Tensor ce, Tensor stats)");
  m.def(
      "kd_loss_bwd(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "Tensor row_weights, Tensor stats, int divergence, float beta, float temperature, "
      "float kd_weight, float ce_weight, Tensor(a!) dlogits) -> ()");
  m.def(
      "kd_loss_fwd_bwd(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "Tensor row_weights, int divergence, float beta, float temperature, float kd_weight, "
      "float ce_weight, Tensor(a!) dlogits) -> (Tensor kd, Tensor ce)");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CPU, m) {
  m.impl("kd_loss_fwd", TORCH_BOX(&modxfer::kd_loss_fwd));
  m.impl("kd_loss_bwd", TORCH_BOX(&modxfer::kd_loss_bwd));
  m.impl("kd_loss_fwd_bwd", TORCH_BOX(&modxfer::kd_loss_fwd_bwd));
}
