// The KD rows on a GPU: the launch of kd_loss_rows.cuh for tensors.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "kd_loss_launch.cuh"
#include "kd_loss_rows.cuh"
#include "modxfer/kd_spec.h"

namespace modxfer::cuda {
namespace {

using Kernel = void (*)(KdRows);

// The last is of weighted sums, kCount.
template <bool kIsResident, int64_t... kIds>
Kernel kernel_of(Divergence divergence, std::integer_sequence<int64_t, kIds...>) {
  constexpr Kernel kKernels[] = {kd_loss_rows<static_cast<Divergence>(kIds), kIsResident>...};
  return kKernels[static_cast<int64_t>(divergence)];
}

}  // namespace

// As kd_loss_fwd_bwd of modxfer/ops.h, on the stream of this number; without dlogits the losses
// alone. -> kd [M], ce [M], stats [M, 6]
std::tuple<Tensor, Tensor, Tensor> kd_loss_cuda(
    Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
    std::optional<Tensor> row_weights, std::vector<int64_t> divergences,
    std::vector<double> numbers, std::vector<double> bends, Biases biases,
    std::optional<Tensor> softening, std::optional<Tensor> dlogits, std::optional<Tensor> extras,
    int64_t stream) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  const Spec spec(divergences, numbers, V, softening, M);
  Tensor kd = new_floats(student_logits, {M}), ce = new_floats(student_logits, {M});
  Tensor stats = new_floats(student_logits, {M, 6});
  KdRows rows =
      rows_of(student_logits, labels, row_weights, spec, bends, biases, softening, dlogits, extras);
  set_teacher(rows, teacher_logits);
  rows.kd = at<float>(kd);
  rows.ce = at<float>(ce);
  rows.stats = at<float>(stats);
  const auto bytes_of = [&](int cluster, bool is_resident) {
    return shared_bytes(rows.classes, cluster, rows.logits, is_resident);
  };
  launch_rows(rows.rows, rows, stream, {}, bytes_of, [&](bool is_resident) {
    constexpr auto kIds = std::make_integer_sequence<int64_t, kNumDivergences + 1>{};
    const Divergence divergence = rows.spec.divergence;
    return is_resident ? kernel_of<true>(divergence, kIds) : kernel_of<false>(divergence, kIds);
  });
  return {kd, ce, stats};
}

}  // namespace modxfer::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(modxfer_csrc, m) {
  m.def(
      "kd_loss_cuda(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "Tensor? row_weights, int[] divergences, float[] numbers, float[] bends, Tensor?[] biases, "
      "Tensor? softening, Tensor(a!)? dlogits, Tensor(b!)? extras, int stream) -> (Tensor kd, "
      "Tensor ce, Tensor stats)");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CUDA, m) {
  m.impl("kd_loss_cuda", TORCH_BOX(&modxfer::cuda::kd_loss_cuda));
}
