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

// Launches kernel_of(is_resident) for `count` rows, whose arguments are `rows`, on the stream of
// this number. bytes_of(cluster, is_resident): of shared memory that a block needs.
template <class Rows, class Bytes, class Choice>
void launch_rows(int count, const Rows& rows, int64_t stream, const Bytes& bytes_of,
                 const Choice& kernel_of) {
  if (count == 0) return;
  int device = 0, multiprocessors = 0, major = 0, most_shared = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const Plan plan = plan_of(count, multiprocessors, major >= 9 ? most_shared : 0,
                            [&](int cluster) { return bytes_of(cluster, true); });
  const int bytes = bytes_of(plan.cluster, plan.is_resident);
  // only a list of classes grows with what a user gives
  STD_TORCH_CHECK(bytes <= most_shared,
                  "teacher_ids, k: expected lists that take a block of this GPU at most ",
                  most_shared, " bytes of shared memory in backend 'cuda', got ", bytes);
  const device::Grid grid{plan.blocks, plan.threads, plan.cluster, bytes};
  check(device::launch(kernel_of(plan.is_resident), grid, reinterpret_cast<cudaStream_t>(stream),
                       rows));
}

}  // namespace modxfer::cuda
