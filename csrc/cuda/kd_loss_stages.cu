// The steps of the KD rows on a GPU: the launches of kd_loss_stages.cuh for tensors.

#include "kd_loss_stages.cuh"

#include <torch/csrc/stable/library.h>

#include <utility>

#include "kd_loss_launch.cuh"
#include "modxfer/kd_spec.h"

namespace modxfer::cuda {
namespace {

struct Steps {
  void (*stats)(KdRows, float*, int);
  void (*sums)(KdRows, const float*, float*);
  void (*write)(KdRows, const float*);
};

template <Divergence kDivergence>
constexpr Steps steps_of() {
  return {kd_loss_stats<kind_of_stats(kDivergence)>, kd_loss_sums<kDivergence>,
          kd_loss_write<kDivergence>};
}

template <int64_t... kIds>
Steps steps_of(Divergence divergence, std::integer_sequence<int64_t, kIds...>) {
  constexpr Steps kSteps[] = {steps_of<static_cast<Divergence>(kIds)>()...};
  return kSteps[static_cast<int64_t>(divergence)];
}

// The last are of weighted sums, kCount.
Steps steps_of(Divergence divergence) {
  return steps_of(divergence, std::make_integer_sequence<int64_t, kNumDivergences + 1>{});
}

KdRows step_rows(const Tensor& student_logits, const Tensor& teacher_logits,
                 const std::optional<Tensor>& labels, const std::optional<Tensor>& row_weights,
                 const KdSpec& spec, const std::vector<double>& bends, const Biases& biases,
                 const std::optional<Tensor>& softening, const std::optional<Tensor>& dlogits) {
  KdRows rows = rows_of(student_logits, labels, row_weights, spec, bends, biases, softening,
                        dlogits, std::nullopt);
  set_teacher(rows, teacher_logits);
  return rows;
}

template <class Kernel, class... Arguments>
void launch_step(const KdRows& rows, int64_t stream, Kernel kernel, Arguments... arguments) {
  if (rows.rows == 0) return;
  const int bytes = shared_bytes(rows.classes, 1, rows.logits, false);
  const Plan plan = streamed_plan_of(
      rows.rows, [&](const Plan& plan) { return clusters_at_once(kernel, plan, bytes); });
  check(device::launch(kernel, grid_of(plan, bytes), reinterpret_cast<cudaStream_t>(stream), rows,
                       arguments...));
}

}  // namespace

// As kd_loss_stats of modxfer/ops.h, on the stream of this number. -> float [M, 8], or [M, 11]
Tensor kd_loss_stats_cuda(Tensor student_logits, Tensor teacher_logits,
                          std::optional<Tensor> labels, std::vector<int64_t> divergences,
                          std::vector<double> numbers, std::vector<double> bends, Biases biases,
                          std::optional<Tensor> softening, bool has_more, int64_t stream) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  const Spec owner(divergences, numbers, V, softening, M);
  const KdSpec& spec = owner;
  const int width = has_more ? kMoreColumns : kPartColumns;
  Tensor parts = new_floats(student_logits, {M, width});
  const KdRows rows = step_rows(student_logits, teacher_logits, labels, std::nullopt, spec, bends,
                                biases, softening, std::nullopt);
  launch_step(rows, stream, steps_of(spec.divergence).stats, at<float>(parts), width);
  return parts;
}

// -> float [M, num_sums]
Tensor kd_loss_sums_cuda(Tensor student_logits, Tensor teacher_logits, Tensor stats,
                         std::vector<int64_t> divergences, std::vector<double> numbers,
                         std::vector<double> bends, Biases biases, std::optional<Tensor> softening,
                         int64_t stream) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  const Spec owner(divergences, numbers, V, softening, M);
  const KdSpec& spec = owner;
  Tensor sums = new_floats(student_logits, {M, num_sums(spec.divergence)});
  const KdRows rows = step_rows(student_logits, teacher_logits, std::nullopt, std::nullopt, spec,
                                bends, biases, softening, std::nullopt);
  launch_step(rows, stream, steps_of(spec.divergence).sums, at<float>(stats), at<float>(sums));
  return sums;
}

// stats: [M, 6 + num_numbers]. classes: of rows of which the logits are a part.
void kd_loss_write_cuda(Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
                        int64_t classes, Tensor row_weights, Tensor stats,
                        std::vector<int64_t> divergences, std::vector<double> numbers,
                        std::vector<double> bends, Biases biases, std::optional<Tensor> softening,
                        Tensor dlogits, int64_t stream) {
  const Spec owner(divergences, numbers, classes, softening, student_logits.size(0));
  const KdSpec& spec = owner;
  STD_TORCH_CHECK(stats.size(1) == 6 + num_numbers(spec.divergence),
                  "stats: expected [M, 6] and the numbers of the whole row behind them");
  const KdRows rows = step_rows(student_logits, teacher_logits, labels, row_weights, spec, bends,
                                biases, softening, dlogits);
  launch_step(rows, stream, steps_of(spec.divergence).write, at<float>(stats));
}

}  // namespace modxfer::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(modxfer_csrc, m) {
  m.def(
      "kd_loss_stats_cuda(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "int[] divergences, float[] numbers, float[] bends, Tensor?[] biases, Tensor? softening, "
      "bool has_more, int stream) -> Tensor parts");
  m.def(
      "kd_loss_sums_cuda(Tensor student_logits, Tensor teacher_logits, Tensor stats, "
      "int[] divergences, float[] numbers, float[] bends, Tensor?[] biases, Tensor? softening, "
      "int stream) -> Tensor sums");
  m.def(
      "kd_loss_write_cuda(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "int classes, Tensor row_weights, Tensor stats, int[] divergences, float[] numbers, "
      "float[] bends, Tensor?[] biases, Tensor? softening, Tensor(a!) dlogits, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CUDA, m) {
  m.impl("kd_loss_stats_cuda", TORCH_BOX(&modxfer::cuda::kd_loss_stats_cuda));
  m.impl("kd_loss_sums_cuda", TORCH_BOX(&modxfer::cuda::kd_loss_sums_cuda));
  m.impl("kd_loss_write_cuda", TORCH_BOX(&modxfer::cuda::kd_loss_write_cuda));
}
