// The KD loss of rows of logits, a cluster of blocks a row. Torch-free; formulas in
// kernels/divergences.py, the same terms as the CPU's rows.
//
//   load     a block has a slice of both rows in its shared memory; bulk copies, tile by tile
//   stats    maxima and sums of e^x of its classes, as tiles come           one exchange
//   sums     of f and u, or what else has to know p and q                   one exchange or two
//   write    dlogits; a tile that is done makes room for the next row's
//
// So each logit is read from memory once, whatever the divergence: 8 bytes, and 2 to 4 are written.
// Rows that do not fit a cluster's shared memory, and devices without clusters, read them in each
// step again. An exchange gives the numbers of every block to every other one, and each adds them
// up in the same order: all have the same bits.
#pragma once

#include "kd_loss_steps.cuh"

namespace modxfer::cuda {

template <Divergence kDivergence, bool kIsResident>
MODXFER_KERNEL void kd_loss_rows(MODXFER_ARGUMENT KdRows rows) {
  const KdSpec& spec = rows.spec;
  Block<kIsResident> block(rows);
  const bool has_all = rows.num_extras > 1;
  block.sides.start(rows.rows);
  for (int index = device::cluster_index(); index < rows.rows; index += device::num_clusters()) {
    const Row row = row_of(rows, index, label_of(rows, index));
    const bool has_ce = row.label >= 0 && spec.ce_weight != 0.0f;
    const bool needs_d1 =
        (has_ce || spec.z_loss_weight != 0.0f || rows.extras != nullptr) && row.inv_t != 1.0f;
    const bool needs_x = has_all || spec.label_smoothing != 0.0f;
    const RowPart whole = stats_of<kDivergence>(rows, block, row, needs_d1, needs_x);
    const Softmaxes softmax = softmaxes_of(whole, row.inv_t);
    const float logd_1 = needs_d1 ? device::log(whole.d_1) : softmax.logd_s;
    const Value value = value_of<kDivergence>(rows, block, row, whole, softmax);

    if (device::thread_index() == 0 && device::cluster_rank() == 0) {
      rows.kd[index] = value.kd < 0.0f ? 0.0f : value.kd;  // below 0 is rounding
      const float x_label = whole.z_label - whole.top_s;
      float ce = has_ce ? logd_1 - x_label : 0.0f;
      if (has_ce && spec.label_smoothing != 0.0f) {
        const float mean = logd_1 - whole.x_sum / static_cast<float>(rows.classes);
        ce += spec.label_smoothing * (mean - ce);
      }
      rows.ce[index] = ce;
      if (rows.stats != nullptr) {
        reinterpret_cast<KdStats*>(rows.stats)[index] = {
            whole.top_s, softmax.logd_s, whole.top_t, softmax.logd_t, value.of_u.sum, logd_1};
      }
      if (rows.extras != nullptr) {
        float* extras = rows.extras + static_cast<int64_t>(index) * rows.num_extras;
        extras[0] = whole.top_s + logd_1;
        if (has_all) {
          const bool has_label = row.label >= 0;
          extras[1] = has_label ? x_label - logd_1 : 0.0f;
          extras[2] = has_label && x_label == 0.0f ? 1.0f : 0.0f;
          extras[3] = softmax.logd_s - row.inv_t * whole.e_x_s * softmax.inv_s;
          extras[4] = softmax.logd_t - row.inv_t * whole.e_x_t * softmax.inv_d_t;
          extras[5] = whole.shared > 0.0f ? 1.0f : 0.0f;
        }
      }
    }
    write_of<kDivergence>(rows, block, row, softmax, value.of_u, logd_1);
  }
}

}  // namespace modxfer::cuda
