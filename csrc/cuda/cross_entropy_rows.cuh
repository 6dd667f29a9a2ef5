// The cross entropy of rows of logits, a cluster of blocks a row; formulas in
// kernels/kd_loss/reference_cross_entropy.py. Torch-free.
//
//   load     as of kd_loss_rows.cuh, of one side
//   sums     maximum, sums of e^x, of x and e^x x, as tiles come            one exchange
//   write    dlogits; a tile that is done makes room for the next row's
//
// Each logit is read from memory once, or in both steps where a row is not held.
#pragma once

#include "kd_loss_args.cuh"
#include "softmax.cuh"

namespace modxfer::cuda {

// The bytes of shared memory that a block needs.
inline int cross_entropy_shared_bytes(int classes, int blocks, Kind logits, bool is_resident) {
  return static_cast<int>(sizeof(SoftmaxRoom<1>)) +
         (is_resident ? slices_bytes(1, classes, blocks, logits) : 0);
}

// Of `rows` without a teacher, its softening, and kd; extras are [rows, 1] or [rows, 4].
template <bool kIsResident>
MODXFER_KERNEL void cross_entropy_rows(MODXFER_ARGUMENT KdRows rows) {
  const KdSpec& spec = rows.spec;
  auto& room = *reinterpret_cast<SoftmaxRoom<1>*>(device::shared_memory());
  const Side student[] = {{rows.student, rows.student_stride, rows.logits, rows.student_bend}};
  Sides<1, kIsResident> sides(student, rows.classes, device::shared_memory() + sizeof(room));
  const Target target(rows.dlogits, rows.dlogits_stride, rows.kind);
  const bool smooths = spec.label_smoothing != 0.0f, has_all = rows.num_extras > 1;
  sides.start(rows.rows);
  int turn = 0;
  for (int row = device::cluster_index(); row < rows.rows; row += device::num_clusters(), ++turn) {
    const int label = label_of(rows, row);
    const bool has_ce = label >= 0 && spec.ce_weight != 0.0f;

    // --- sums
    Softmax q[1];
    for (int tile = 0; tile < sides.num_tiles(); ++tile) {
      sides.wait(tile, turn);
      sides.for_each_four(tile, [&](int i, int n) {
        Four z[1];
        sides.read(row, i, n, false, z);
        q->add(*z, (1u << n) - 1, kLog2E, false, smooths || has_all);
        pick(*z, label - sides.begin() - i, q->z_label);
      });
    }
    reduce_row(q, kLog2E, turn, room);
    const float log_d = device::log(q->d), lse = q->top + log_d;
    if (device::thread_index() == 0 && device::cluster_rank() == 0) {
      const float x_label = q->z_label - q->top;
      float ce = has_ce ? log_d - x_label : 0.0f;
      if (has_ce && smooths) ce += spec.label_smoothing * ((log_d - q->x_sum / q->count) - ce);
      rows.ce[row] = ce;
      if (rows.extras != nullptr) {
        float* extras = rows.extras + static_cast<int64_t>(row) * rows.num_extras;
        extras[0] = lse;
        if (has_all) {
          extras[1] = label >= 0 ? x_label - log_d : 0.0f;
          extras[2] = label >= 0 && x_label == 0.0f ? 1.0f : 0.0f;
          extras[3] = log_d - q->e_x_sum / q->d;
        }
      }
    }

    // --- write
    const float weight = rows.dlogits == nullptr ? 0.0f : rows.row_weights[row];
    const float ce_weight = has_ce ? weight * spec.ce_weight : 0.0f;
    float of_q = ce_weight;
    if (spec.z_loss_weight != 0.0f) of_q += 2.0f * weight * spec.z_loss_weight * lse;
    const float of_e = of_q / q->d, shift = ce_weight * spec.label_smoothing / spec.classes;
    const float of_label = ce_weight * (1.0f - spec.label_smoothing);
    write_row(sides, row, rows, target, weight, [&](int i, float z) {
      const float dz = of_e * device::exp2_approx((z - q->top) * kLog2E) - shift;
      return i == label ? dz - of_label : dz;
    });
  }
}

}  // namespace modxfer::cuda
