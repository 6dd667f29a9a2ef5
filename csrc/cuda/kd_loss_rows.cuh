// The KD loss of rows of logits, a cluster of blocks a row. Torch-free; formulas in
// kernels/divergences.py, the same terms as the CPU's rows.
//
//   load     a block has a slice of both rows in its shared memory; bulk copies, tile by tile
//   stats    maxima and sums of e^x of its classes, as tiles come           one exchange
//   sums     of f and u, where p and q have to be known first               one exchange
//   write    dlogits; a tile that is done makes room for the next row's
//
// So each logit is read from memory once, whatever the divergence: 8 bytes, and 2 to 4 are written.
// Rows that do not fit a cluster's shared memory, and devices without clusters, read them in each
// step again. An exchange gives the numbers of every block to every other one, and each adds them
// up in the same order: all have the same bits.
#pragma once

#include "kd_loss_args.cuh"

namespace modxfer::cuda {

// What a thread, then a block, then a row knows of the classes so far. Sums are relative to the
// tops.
struct RowPart {
  float top_s, top_t;
  float d_s, d_t;      // of e^((z - top) / temperature)
  float d_1;           // of e^(z_s - top_s)
  float cross;         // of e_t (x_t - x_s), x = z - top
  float e_x_s, e_x_t;  // of e x
  float x_sum;         // of z_s - top_s
  float z_label;
};
constexpr int kTops = 2, kPart = sizeof(RowPart) / sizeof(float), kSums = kPart - kTops;

// Makes the sums of `count` classes relative to larger tops.
MODXFER_DEVICE void raise(RowPart& part, float top_s, float top_t, float rate, int count) {
  if (top_s > part.top_s) {
    const float less = part.top_s - top_s;
    const float factor = device::exp2_approx(less * rate);
    if (part.d_t != 0.0f) part.cross -= less * part.d_t;
    part.e_x_s = factor == 0.0f ? 0.0f : factor * (part.e_x_s + less * part.d_s);
    part.d_s *= factor;
    part.d_1 *= device::exp2_approx(less * kLog2E);
    if (count > 0) part.x_sum += less * static_cast<float>(count);
    part.top_s = top_s;
  }
  if (top_t > part.top_t) {
    const float less = part.top_t - top_t;
    const float factor = device::exp2_approx(less * rate);
    part.cross = factor == 0.0f ? 0.0f : factor * (part.cross + less * part.d_t);
    part.e_x_t = factor == 0.0f ? 0.0f : factor * (part.e_x_t + less * part.d_t);
    part.d_t *= factor;
    part.top_t = top_t;
  }
}

// Of a block's shared memory, behind its slices.
struct Room {
  float warps[kMaxWarps * kPart];
  // what the blocks tell one another; of every second row the first, which some blocks may read
  // while others are at the next row already
  float first[2][kMaxBlocks * kPart], second[kMaxBlocks * 3];
};

constexpr int kRoomBytes = sizeof(Room);

// The bytes that a block needs.
inline int shared_bytes(int classes, int blocks, Kind logits, bool is_resident) {
  return kRoomBytes + (is_resident ? slices_bytes(2, classes, blocks, logits) : 0);
}

template <Divergence kDivergence, bool kIsResident>
MODXFER_KERNEL void kd_loss_rows(MODXFER_ARGUMENT KdRows rows) {
  constexpr bool kIsForwardKl = kDivergence == Divergence::kForwardKl;
  KdSpec spec = rows.spec;
  Room& room = *reinterpret_cast<Room*>(device::shared_memory());
  const Side both[] = {{rows.student, rows.student_stride, rows.logits, rows.student_bend},
                       {rows.teacher, rows.teacher_stride, rows.logits, rows.teacher_bend}};
  Sides<2, kIsResident> sides(both, rows.classes, device::shared_memory() + sizeof(Room));
  const bool leads = device::thread_index() == 0;
  const Target target(rows.dlogits, rows.dlogits_stride, rows.kind);
  const bool has_all = rows.num_extras > 1;
  const bool needs_x = has_all || spec.label_smoothing != 0.0f;
  sides.start(rows.rows);
  int turn = 0;
  for (int row = device::cluster_index(); row < rows.rows; row += device::num_clusters(), ++turn) {
    const int label = label_of(rows, row);
    soften(rows, row, spec);
    const float inv_t = spec.inv_temperature, rate = inv_t * kLog2E;
    const bool has_ce = label >= 0 && spec.ce_weight != 0.0f;
    const bool has_z = spec.z_loss_weight != 0.0f;
    const bool needs_d1 = (has_ce || has_z || rows.extras != nullptr) && inv_t != 1.0f;

    // --- stats
    RowPart part = {kNoTop, kNoTop};
    int count = 0;
    for (int tile = 0; tile < sides.num_tiles(); ++tile) {
      sides.wait(tile, turn);
      sides.for_each_four(tile, [&](int i, int n) {
        Four z_s, z_t;
        sides.read(row, i, n, false, z_s, z_t);
        float top_s = kNoTop, top_t = kNoTop;
        for (int k = 0; k < 4; ++k) {
          top_s = vmax(z_s.of[k], top_s);
          top_t = vmax(z_t.of[k], top_t);
        }
        raise(part, top_s, top_t, rate, count);
        count += n;
        MODXFER_UNROLL
        for (int k = 0; k < 4; ++k) {
          if (k >= n) break;
          const float x_s = z_s.of[k] - part.top_s, x_t = z_t.of[k] - part.top_t;
          const float e_s = device::exp2_approx(x_s * rate), e_t = device::exp2_approx(x_t * rate);
          part.d_s += e_s;
          part.d_t += e_t;
          if (needs_d1) part.d_1 += device::exp2_approx(x_s * kLog2E);
          if constexpr (kIsForwardKl) part.cross += e_t == 0.0f ? 0.0f : e_t * (x_t - x_s);
          if (needs_x) {
            part.x_sum += x_s;
            part.e_x_s += e_s == 0.0f ? 0.0f : e_s * x_s;
            part.e_x_t += e_t == 0.0f ? 0.0f : e_t * x_t;
          }
        }
        pick(z_s, label - sides.begin() - i, part.z_label);
      });
    }
    float* tops = &part.top_s;
    float highest[kTops] = {part.top_s, part.top_t};
    reduce_block<true, kTops>(highest, room.warps);
    raise(part, highest[0], highest[1], rate, count);
    reduce_block<false, kSums>(tops + kTops, room.warps);
    float* of_blocks = room.first[turn & 1];
    exchange<kPart>(tops, of_blocks);
    RowPart whole = {kNoTop, kNoTop};
    for (int rank = 0; rank < device::cluster_size(); ++rank) {
      const auto& other = *reinterpret_cast<const RowPart*>(of_blocks + rank * kPart);
      whole.top_s = vmax(other.top_s, whole.top_s);
      whole.top_t = vmax(other.top_t, whole.top_t);
    }
    const int per_block = slice_size(rows.classes, device::cluster_size());
    for (int rank = 0; rank < device::cluster_size(); ++rank) {
      RowPart other = *reinterpret_cast<const RowPart*>(of_blocks + rank * kPart);
      const int left = rows.classes - rank * per_block;
      raise(other, whole.top_s, whole.top_t, rate, left < per_block ? vmax(left, 0) : per_block);
      float* to = &whole.top_s;
      const float* from = &other.top_s;
      MODXFER_UNROLL
      for (int i = kTops; i < kPart; ++i) to[i] += from[i];
    }
    const float logd_s = device::log(whole.d_s), logd_t = device::log(whole.d_t);
    const float logd_1 = needs_d1 ? device::log(whole.d_1) : logd_s;
    const float inv_s = 1.0f / whole.d_s, inv_d_t = 1.0f / whole.d_t;
    const float logd_gap = device::log(whole.d_t * inv_s);

    // --- sums
    float sums[3] = {};  // f, u, and whether a class is the largest of both
    const auto class_of = [&](float z_s, float z_t) {
      const float x_s = z_s - whole.top_s, x_t = z_t - whole.top_t;
      const float d = (x_t - x_s) * inv_t - logd_gap;  // 0 of equal ones, to the bit
      return Class{device::exp2_approx(x_s * rate) * inv_s,
                   device::exp2_approx(x_t * rate) * inv_d_t, d, x_s * inv_t - logd_s,
                   x_t * inv_t - logd_t};
    };
    if (!kIsForwardKl || has_all) {
      for (int tile = 0; tile < sides.num_tiles(); ++tile) {
        sides.for_each_four(tile, [&](int i, int n) {
          Four z_s, z_t;
          sides.read(row, i, n, true, z_s, z_t);
          MODXFER_UNROLL
          for (int k = 0; k < 4; ++k) {
            if (k >= n) break;
            const Terms terms = terms_of<kDivergence>(class_of(z_s.of[k], z_t.of[k]), rows);
            sums[0] += terms.f;
            sums[1] += terms.u;
            const bool is_top = z_s.of[k] == whole.top_s && z_t.of[k] == whole.top_t;
            sums[2] = is_top ? 1.0f : sums[2];
          }
        });
      }
      reduce_block<false, 3>(sums, room.warps);
      exchange<3>(sums, room.second);
      sums[0] = sums[1] = sums[2] = 0.0f;
      for (int rank = 0; rank < device::cluster_size(); ++rank) {
        for (int i = 0; i < 3; ++i) sums[i] += room.second[3 * rank + i];
      }
    }
    const float u_sum = kIsForwardKl ? -1.0f : sums[1];

    if (leads && device::cluster_rank() == 0) {
      const float kd = kIsForwardKl ? whole.cross * inv_d_t * inv_t - logd_gap : sums[0];
      rows.kd[row] = kd < 0.0f ? 0.0f : kd;  // below 0 is rounding
      const float x_label = whole.z_label - whole.top_s;
      float ce = has_ce ? logd_1 - x_label : 0.0f;
      if (has_ce && spec.label_smoothing != 0.0f) {
        const float mean = logd_1 - whole.x_sum / static_cast<float>(rows.classes);
        ce += spec.label_smoothing * (mean - ce);
      }
      rows.ce[row] = ce;
      if (rows.stats != nullptr) {
        reinterpret_cast<KdStats*>(rows.stats)[row] = {whole.top_s, logd_s, whole.top_t,
                                                       logd_t,      u_sum,  logd_1};
      }
      if (rows.extras != nullptr) {
        float* extras = rows.extras + static_cast<int64_t>(row) * rows.num_extras;
        extras[0] = whole.top_s + logd_1;
        if (has_all) {
          extras[1] = label >= 0 ? x_label - logd_1 : 0.0f;
          extras[2] = label >= 0 && x_label == 0.0f ? 1.0f : 0.0f;
          extras[3] = logd_s - inv_t * whole.e_x_s * inv_s;
          extras[4] = logd_t - inv_t * whole.e_x_t * inv_d_t;
          extras[5] = sums[2] > 0.0f ? 1.0f : 0.0f;
        }
      }
    }

    // --- write
    const float weight = rows.dlogits == nullptr ? 0.0f : rows.row_weights[row];
    const float kd_scale = weight * spec.kd_weight * inv_t;
    const float ce_scale = has_ce ? weight * spec.ce_weight : 0.0f;
    float q1_scale = ce_scale;
    if (has_z) q1_scale += 2.0f * weight * spec.z_loss_weight * (whole.top_s + logd_1);
    const float shift = ce_scale * spec.label_smoothing / spec.classes;
    const float of_label = ce_scale * (1.0f - spec.label_smoothing);
    for (int tile = 0; tile < sides.num_tiles(); ++tile) {
      if (rows.dlogits != nullptr) {
        sides.for_each_step(tile, [&](int i, int n) {
          Four z_s, z_t;
          if (weight != 0.0f && n > 0) sides.read(row, i, n, true, z_s, z_t);
          // halves over the floats that they are made of: those of a step are read before
          if (!kIsResident) device::sync_block();
          Four dlogits = {};  // an ignored row may hold anything, NaN included
          if (weight != 0.0f) {
            MODXFER_UNROLL
            for (int k = 0; k < 4; ++k) {
              if (k >= n) break;
              const Class x = class_of(z_s.of[k], z_t.of[k]);
              const Terms terms = terms_of<kDivergence>(x, rows);
              float dz = kd_scale * (terms.u - x.q * u_sum) - shift;
              if (q1_scale != 0.0f) {
                const float x_s = z_s.of[k] - whole.top_s;
                dz += q1_scale * (needs_d1 ? device::exp2_approx((x_s - logd_1) * kLog2E) : x.q);
              }
              if (sides.begin() + i + k == label) dz -= of_label;
              if (!rows.student_bend.is_identity()) dz *= bend_slope(z_s.of[k], rows.student_bend);
              dlogits.of[k] = dz;
            }
          }
          target.put(row, sides.begin() + i, n, dlogits);
        });
      }
      sides.refill(tile, row, rows.rows);
    }
  }
}

}  // namespace modxfer::cuda
