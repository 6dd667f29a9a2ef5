// What the ops of rows of logits share: their tensors as arguments of a kernel, and its launch.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "kd_loss_args.cuh"
#include "kd_loss_plan.h"
#include "tensors.cuh"

namespace modxfer::cuda {

// Of the student's logits and what belongs to them; the teacher and the losses are left out.
inline KdRows rows_of(const Tensor& student_logits, const std::optional<Tensor>& labels,
                      const std::optional<Tensor>& row_weights, const KdSpec& spec,
                      const std::vector<double>& bends, const Biases& biases,
                      const std::optional<Tensor>& softening, const std::optional<Tensor>& dlogits,
                      const std::optional<Tensor>& extras) {
  STD_TORCH_CHECK(spec.num_parts <= kMaxParts, "divergences: expected at most eight in a sum");
  KdRows rows = {};
  rows.student = student_logits.data_ptr();
  rows.student_stride = student_logits.stride(0);
  rows.logits = kind_of(student_logits);
  rows.labels = at<int64_t>(labels);
  rows.row_weights = at<float>(row_weights);
  rows.softening = at<float>(softening);
  rows.extras = at<float>(extras);
  rows.num_extras = extras.has_value() ? static_cast<int>(extras->size(1)) : 0;
  rows.dlogits = at<void>(dlogits);
  if (dlogits.has_value()) {
    rows.dlogits_stride = dlogits->stride(0);
    rows.kind = kind_of(*dlogits);
  }
  rows.rows = static_cast<int>(student_logits.size(0));
  rows.classes = static_cast<int>(student_logits.size(1));
  if (!bends.empty()) {
    rows.student_bend = {static_cast<float>(bends[0]), static_cast<float>(bends[1])};
    rows.teacher_bend = {static_cast<float>(bends[2]), static_cast<float>(bends[3])};
  }
  if (!biases.empty()) {
    STD_TORCH_CHECK(rows.logits == Kind::kFloat, "logits: expected float32 beside a bias");
    rows.student_bend.bias = at<float>(biases[0]);
    rows.teacher_bend.bias = at<float>(biases[1]);
  }
  rows.spec = spec;
  std::copy_n(spec.parts, spec.num_parts, rows.parts);
  return rows;
}

inline void set_teacher(KdRows& rows, const Tensor& teacher_logits) {
  STD_TORCH_CHECK(kind_of(teacher_logits) == rows.logits,
                  "teacher_logits: expected the dtype of student_logits");
  rows.teacher = teacher_logits.data_ptr();
  rows.teacher_stride = teacher_logits.stride(0);
}

// Of a plan's blocks, of so many bytes of shared memory.
inline device::Grid grid_of(const Plan& plan, int bytes) {
  return {plan.blocks, plan.threads, plan.cluster, bytes};
}

template <class Kernel>
int clusters_at_once(Kernel kernel, const Plan& plan, int bytes) {
  int clusters = 0;
  const auto* function = reinterpret_cast<const void*>(kernel);
  check(device::clusters_at_once(function, grid_of(plan, bytes), clusters));
  return clusters;
}

// Launches kernel_of(is_resident) for `count` rows, whose arguments are `rows`, on the stream of
// this number; of no rows, says alone whether it could. bytes_of(cluster, is_resident): of shared
// memory that a block needs, a list in it.
template <class Rows, class Bytes, class Choice>
void launch_rows(int count, const Rows& rows, int64_t stream, const List& list,
                 const Bytes& bytes_of, const Choice& kernel_of) {
  const int most_shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int most = most_listed(list, bytes_of(1, false), most_shared);
  STD_TORCH_CHECK(list.count <= most, "teacher_ids, k: expected at most ", most < 0 ? 0 : most,
                  " classes a row in backend 'cuda' on this GPU, whose blocks have ", most_shared,
                  " bytes of shared memory, got ", list.count);
  if (count == 0) return;
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  int registers = 0;
  check(device::prepare(reinterpret_cast<const void*>(kernel_of(true)), registers));
  const auto at_once = [&](const Plan& plan) {
    const int bytes = bytes_of(plan.cluster, plan.is_resident);
    return clusters_at_once(kernel_of(plan.is_resident), plan, bytes);
  };
  const Plan plan = plan_of(
      count, major >= 9 ? most_shared : 0, registers,
      [&](int cluster) { return bytes_of(cluster, true); }, at_once);
  const device::Grid grid = grid_of(plan, bytes_of(plan.cluster, plan.is_resident));
  check(device::launch(kernel_of(plan.is_resident), grid, reinterpret_cast<cudaStream_t>(stream),
                       rows));
}

}  // namespace modxfer::cuda
