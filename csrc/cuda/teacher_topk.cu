// The K largest logits of rows on a GPU: the launch of teacher_topk_rows.cuh for tensors.

#include "teacher_topk_rows.cuh"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "kd_loss_launch.cuh"

namespace modxfer::cuda {

// As teacher_topk of modxfer/ops.h, on the stream of this number.
std::tuple<Tensor, Tensor, Tensor> teacher_topk_cuda(Tensor logits, int64_t k,
                                                     std::vector<double> bends, double temperature,
                                                     int64_t stream) {
  const int64_t M = logits.size(0), V = logits.size(1);
  STD_TORCH_CHECK(0 < k && k <= V && V < std::numeric_limits<int32_t>::max(),
                  "k: expected a number of classes");
  Tensor ids = torch::stable::new_empty(logits, {M, k}, torch::headeronly::ScalarType::Int);
  Tensor log_probs = new_floats(logits, {M, k}), log_tail = new_floats(logits, {M});
  TeacherTopKRows rows = {};
  rows.logits = logits.data_ptr();
  rows.stride = logits.stride(0);
  rows.kind = kind_of(logits);
  if (!bends.empty()) rows.bend = {static_cast<float>(bends[2]), static_cast<float>(bends[3])};
  rows.inv_temperature = static_cast<float>(1.0 / temperature);
  rows.rows = static_cast<int>(M);
  rows.classes = static_cast<int>(V);
  rows.count = static_cast<int>(k);
  rows.ids = at<int32_t>(ids);
  rows.log_probs = at<float>(log_probs);
  rows.log_tail = at<float>(log_tail);
  const auto bytes_of = [&](int cluster, bool is_resident) {
    return teacher_topk_shared_bytes(rows.classes, rows.count, cluster, rows.kind, is_resident);
  };
  const List list = {rows.count, kFoundListBytes};
  launch_rows(rows.rows, rows, stream, list, bytes_of, [](bool is_resident) {
    return is_resident ? teacher_topk_rows<true> : teacher_topk_rows<false>;
  });
  return {ids, log_probs, log_tail};
}

}  // namespace modxfer::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(modxfer_csrc, m) {
  m.def(
      "teacher_topk_cuda(Tensor logits, int k, float[] bends, float temperature, int stream) -> "
      "(Tensor ids, Tensor log_probs, Tensor log_tail)");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CUDA, m) {
  m.impl("teacher_topk_cuda", TORCH_BOX(&modxfer::cuda::teacher_topk_cuda));
}
