// The steps of a row one by one, for a row whose classes several ranks share: between two
// of them the ranks tell each other what they found, see kernels/kd_loss/stages.py. Torch-free.
//
// `rows` has the classes of this rank and labels in [0, classes], `classes` for one of another
// rank; spec.classes is of the whole row. Each step reads them from memory once.
#pragma once

#include "kd_loss_steps.cuh"

namespace modxfer::cuda {

// The columns of what a rank says of its classes, in the order of stages.py; the last three where
// asked for.
constexpr int kPartColumns = 8, kMoreColumns = 11;

// A label of another rank is one that no class here has.
MODXFER_DEVICE int part_label_of(const KdRows& rows, int row) {
  const int64_t label = rows.labels == nullptr ? -1 : rows.labels[row];
  return label < rows.classes ? static_cast<int>(label) : 0x7FFFFFFF;
}

// The instance that has the statistics of a divergence: a KL's own, or kCount for all others.
constexpr Divergence kind_of_stats(Divergence divergence) {
  return is_kl(divergence) ? divergence : Divergence::kCount;
}

// -> parts [rows, width], width one of the two above.
template <Divergence kDivergence>
MODXFER_KERNEL void kd_loss_stats(MODXFER_ARGUMENT KdRows rows, float* parts, int width) {
  static_assert(kDivergence == kind_of_stats(kDivergence));
  const bool has_more = width == kMoreColumns;
  Block<false> block(rows);
  for (int index = device::cluster_index(); index < rows.rows; index += device::num_clusters()) {
    const Row row = row_of(rows, index, part_label_of(rows, index));
    const bool needs_d1 = row.inv_t != 1.0f,
               needs_x = has_more || rows.spec.label_smoothing != 0.0f;
    const RowPart whole = stats_of<kDivergence>(rows, block, row, needs_d1, needs_x);
    if (device::thread_index() != 0 || device::cluster_rank() != 0) continue;
    float mean = 0.0f;
    if constexpr (kDivergence == Divergence::kForwardKl) {
      mean = whole.cross / whole.d_t * row.inv_t + device::log(whole.d_s / whole.d_t);
    } else if constexpr (kDivergence == Divergence::kReverseKl) {
      mean = whole.cross / whole.d_s * row.inv_t + device::log(whole.d_t / whole.d_s);
    }
    const float columns[kMoreColumns] = {whole.top_s,
                                         whole.d_s,
                                         whole.top_t,
                                         whole.d_t,
                                         needs_d1 ? whole.d_1 : whole.d_s,
                                         mean,
                                         whole.x_sum / static_cast<float>(rows.classes),
                                         whole.z_label,
                                         whole.e_x_s / whole.d_s,
                                         whole.e_x_t / whole.d_t,
                                         whole.shared > 0.0f ? 1.0f : 0.0f};
    float* out = parts + static_cast<int64_t>(index) * width;
    MODXFER_UNROLL
    for (int i = 0; i < kMoreColumns; ++i) {
      if (i < width) out[i] = columns[i];
    }
  }
}

MODXFER_DEVICE Softmaxes softmaxes_of(const KdStats& stats, float inv_t) {
  return {stats.max_s,
          stats.logd_s,
          stats.max_t,
          stats.logd_t,
          stats.logd_t - stats.logd_s,
          device::exp(-stats.logd_s),
          device::exp(-stats.logd_t),
          inv_t};
}

// stats: [rows, 6], KdStats of the whole row -> sums [rows, num_sums].
template <Divergence kDivergence>
MODXFER_KERNEL void kd_loss_sums(MODXFER_ARGUMENT KdRows rows, const float* stats, float* sums) {
  Block<false> block(rows);
  for (int index = device::cluster_index(); index < rows.rows; index += device::num_clusters()) {
    const Row row = row_of(rows, index, part_label_of(rows, index));
    const Softmaxes softmax =
        softmaxes_of(reinterpret_cast<const KdStats*>(stats)[index], row.inv_t);
    const bool writes = device::thread_index() == 0 && device::cluster_rank() == 0;
    if constexpr (is_of_row(kDivergence)) {
      const auto of_row = sums_of_row<kDivergence>(rows, block, row, softmax);
      if (writes) reinterpret_cast<KdRowSums<float>*>(sums)[index] = of_row;
    } else if constexpr (is_of_logits(kDivergence)) {
      const Gaps gaps = gaps_of<kDivergence>(block, row);
      if (writes) {
        put_logit_sums<kDivergence>(gaps.squares, static_cast<float>(rows.classes), gaps.scales.s,
                                    gaps.scales.t, row.inv_t, sums + index * num_sums(kDivergence));
      }
    } else {
      const Terms terms = sums_of_terms<kDivergence>(rows, block, row, softmax);
      if (writes) reinterpret_cast<Terms*>(sums)[index] = terms;
    }
  }
}

// stats: [rows, width] of the whole row, KdStats and its `num_numbers` behind them.
template <Divergence kDivergence>
MODXFER_KERNEL void kd_loss_write(MODXFER_ARGUMENT KdRows rows, const float* stats) {
  constexpr int kStats = sizeof(KdStats) / sizeof(float);
  constexpr int kWidth = kStats + static_cast<int>(num_numbers(kDivergence));
  Block<false> block(rows);
  for (int index = device::cluster_index(); index < rows.rows; index += device::num_clusters()) {
    const Row row = row_of(rows, index, part_label_of(rows, index));
    const float* of = stats + static_cast<int64_t>(index) * kWidth;
    const auto& whole = *reinterpret_cast<const KdStats*>(of);
    OfU of_u = {whole.u_sum};
    if constexpr (is_of_row(kDivergence)) of_u.of_row = {of[kStats], of[kStats + 1]};
    if constexpr (is_of_logits(kDivergence)) {
      const OfLogits<float> of_row =
          of_numbers<kDivergence>(of + kStats, row.inv_t, of_u.scales.s, of_u.scales.t);
      of_u.factor = of_row.factor;
      of_u.back = of_row.back;
    }
    write_of<kDivergence>(rows, block, row, softmaxes_of(whole, row.inv_t), of_u, whole.logd_1);
  }
}

}  // namespace modxfer::cuda
