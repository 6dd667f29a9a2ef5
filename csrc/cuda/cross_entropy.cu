// Cross entropy rows on a GPU: the launch of cross_entropy_rows.cuh for tensors.

#include "cross_entropy_rows.cuh"

#include <torch/csrc/stable/library.h>

#include "kd_loss_launch.cuh"

namespace modxfer::cuda {

// As cross_entropy_fwd_bwd of modxfer/ops.h, on the stream of this number; without dlogits the loss
// alone. -> ce [M]
Tensor cross_entropy_cuda(Tensor logits, std::optional<Tensor> labels,
                          std::optional<Tensor> row_weights, double ce_weight,
                          double label_smoothing, double z_loss_weight, std::vector<double> bends,
                          Biases biases, std::optional<Tensor> dlogits,
                          std::optional<Tensor> extras, int64_t stream) {
  Tensor ce = new_floats(logits, {logits.size(0)});
  KdSpec spec = {};
  spec.inv_temperature = 1.0f;
  spec.ce_weight = static_cast<float>(ce_weight);
  spec.label_smoothing = static_cast<float>(label_smoothing);
  spec.z_loss_weight = static_cast<float>(z_loss_weight);
  spec.classes = static_cast<float>(logits.size(1));
  KdRows rows =
      rows_of(logits, labels, row_weights, spec, bends, biases, std::nullopt, dlogits, extras);
  rows.ce = at<float>(ce);
  const auto bytes_of = [&](int cluster, bool is_resident) {
    return cross_entropy_shared_bytes(rows.classes, cluster, rows.logits, is_resident);
  };
  launch_rows(rows.rows, rows, stream, {}, bytes_of, [](bool is_resident) {
    return is_resident ? cross_entropy_rows<true> : cross_entropy_rows<false>;
  });
  return ce;
}

}  // namespace modxfer::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(modxfer_csrc, m) {
  m.def(
      "cross_entropy_cuda(Tensor logits, Tensor? labels, Tensor? row_weights, float ce_weight, "
      "float label_smoothing, float z_loss_weight, float[] bends, Tensor?[] biases, "
      "Tensor(a!)? dlogits, Tensor(b!)? extras, int stream) -> Tensor ce");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CUDA, m) {
  m.impl("cross_entropy_cuda", TORCH_BOX(&modxfer::cuda::cross_entropy_cuda));
}
