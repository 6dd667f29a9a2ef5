// The KD rows of teachers that list a few classes on a GPU: the launch of topk_kd_loss_rows.cuh for
// tensors.

#include "topk_kd_loss_rows.cuh"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "kd_loss_launch.cuh"
#include "modxfer/kd_spec.h"

namespace modxfer::cuda {
namespace {

using torch::headeronly::ScalarType;
using Kernel = void (*)(TopKRows);

constexpr auto kFirstOfLogits = static_cast<int64_t>(Divergence::kLogitsMse);

template <bool kIsResident, int64_t... kIds>
Kernel kernel_of(Divergence divergence, std::integer_sequence<int64_t, kIds...>) {
  constexpr Kernel kKernels[] = {topk_kd_loss_rows<static_cast<Divergence>(kIds), kIsResident>...,
                                 topk_kd_loss_rows<Divergence::kCount, kIsResident>};
  const auto id =
      divergence == Divergence::kCount ? sizeof...(kIds) : static_cast<size_t>(divergence);
  STD_TORCH_CHECK(id <= sizeof...(kIds), "divergences: expected those of probabilities");
  return kKernels[id];
}

}  // namespace

// As topk_kd_loss of modxfer/ops.h, on the stream of this number. -> kd [M], ce [M]
std::tuple<Tensor, Tensor> topk_kd_loss_cuda(
    Tensor student_logits, Tensor ids, Tensor log_probs, std::optional<Tensor> log_tail,
    int64_t tail, double missing, std::optional<Tensor> labels, std::optional<Tensor> row_weights,
    std::vector<int64_t> divergences, std::vector<double> numbers, std::vector<double> bends,
    Biases biases, std::optional<Tensor> softening, std::optional<Tensor> dlogits,
    std::optional<Tensor> extras, int64_t stream) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  STD_TORCH_CHECK(log_probs.scalar_type() == ScalarType::Float,
                  "teacher_log_probs: expected float32");
  STD_TORCH_CHECK(0 <= tail && tail < static_cast<int64_t>(TopKTail::kCount),
                  "tail: expected one that these CUDA kernels were built with");
  const Spec spec(divergences, numbers, V, softening, M);
  Tensor kd = new_floats(student_logits, {M}), ce = new_floats(student_logits, {M});
  TopKRows rows = {};
  rows.of =
      rows_of(student_logits, labels, row_weights, spec, bends, biases, softening, dlogits, extras);
  rows.of.kd = at<float>(kd);
  rows.of.ce = at<float>(ce);
  rows.ids = ids.data_ptr();
  rows.are_wide = ids.scalar_type() == ScalarType::Long;
  rows.log_p = at<float>(log_probs);
  rows.log_tail = at<float>(log_tail);
  rows.count = static_cast<int>(ids.size(1));
  rows.tail = static_cast<TopKTail>(tail);
  rows.missing = static_cast<float>(missing);
  const auto bytes_of = [&](int cluster, bool is_resident) {
    return topk_shared_bytes(rows.of.classes, rows.count, cluster, rows.of.logits, is_resident);
  };
  const List list = {rows.count, kTopKListBytes};
  launch_rows(rows.of.rows, rows, stream, list, bytes_of, [&](bool is_resident) {
    constexpr auto kIds = std::make_integer_sequence<int64_t, kFirstOfLogits>{};
    const Divergence divergence = rows.of.spec.divergence;
    return is_resident ? kernel_of<true>(divergence, kIds) : kernel_of<false>(divergence, kIds);
  });
  return {kd, ce};
}

}  // namespace modxfer::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(modxfer_csrc, m) {
  m.def(
      "topk_kd_loss_cuda(Tensor student_logits, Tensor ids, Tensor log_probs, Tensor? log_tail, "
      "int tail, float missing, Tensor? labels, Tensor? row_weights, int[] divergences, "
      "float[] numbers, float[] bends, Tensor?[] biases, Tensor? softening, Tensor(a!)? dlogits, "
      "Tensor(b!)? extras, int stream) -> (Tensor kd, Tensor ce)");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CUDA, m) {
  m.impl("topk_kd_loss_cuda", TORCH_BOX(&modxfer::cuda::topk_kd_loss_cuda));
}
