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

#include "device.cuh"
#include "modxfer/bend.h"
#include "modxfer/kd_loss.h"

namespace modxfer::cuda {

#include "scalar.cuh"

#include "modxfer/kd_loss_terms.h"

constexpr float kInf = __builtin_huge_valf();
constexpr float kNoTop = -3.40282347e38f;  // below it are classes without probability alone
constexpr float kLog2E = 1.44269504f;
constexpr int kLanes = 32, kMaxWarps = 32, kMaxBlocks = 16;
constexpr int kTile = 2048;  // floats of a bulk copy

enum class Kind : int { kFloat, kBf16, kHalf };

MODXFER_BOTH int size_of(Kind kind) { return kind == Kind::kFloat ? 4 : 2; }

// Divergences of a weighted sum; more are refused before a launch.
constexpr int kMaxParts = 8;

struct KdRows {
  const void* student;  // [rows, classes] of `logits`, rows so many elements apart
  const void* teacher;
  int64_t student_stride, teacher_stride;
  Kind logits;
  const int64_t* labels;     // or nullptr; below 0 there is none
  const float* row_weights;  // of dlogits
  const float* softening;    // [rows, 2], a temperature and a factor of kd_weight, or nullptr
  float* kd;                 // [rows]
  float* ce;
  float* stats;   // [rows, 6], KdStats, or nullptr
  float* extras;  // [rows, num_extras], or nullptr
  int num_extras;
  void* dlogits;  // rows so many elements apart, of `kind`; nullptr: the losses alone
  int64_t dlogits_stride;
  Kind kind;
  int rows, classes;
  Bend student_bend, teacher_bend;
  KdSpec spec;  // whose `parts` are these, whatever it points to
  KdSummand parts[kMaxParts];
};

// Of a row that so many blocks share, a multiple of 8.
MODXFER_BOTH int slice_size(int classes, int blocks) {
  return ((classes + blocks - 1) / blocks + 7) / 8 * 8;
}

MODXFER_DEVICE float bent(float raw, const Bend& bend) {
  if (bend.cap == 0.0f) return raw * bend.scale;
  const float x = raw * (bend.scale / bend.cap);
  const float e = vexp(-2.0f * vabs(x));
  const float small = x * (1.0f - x * x * (1.0f / 3.0f - x * x * (2.0f / 15.0f)));
  const float large = (1.0f - e) / (1.0f + e);
  const float t = vabs(x) < 0.1f ? small : x < 0.0f ? -large : large;
  return vabs(raw) == kInf ? raw : bend.cap * t;
}

MODXFER_DEVICE float bend_slope(float z, const Bend& bend) {
  if (bend.cap == 0.0f) return bend.scale;
  const float t = vmax(vmin(z / bend.cap, 1.0f), -1.0f);
  return bend.scale * (1.0f - t * t);
}

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
  float first[kMaxBlocks * kPart], second[kMaxBlocks * 3];  // what the blocks tell one another
};

constexpr int kRoomBytes = sizeof(Room);

// The bytes that a block needs: for rows that it holds, `tiles` barriers and both slices.
inline int shared_bytes(int classes, int blocks, Kind logits, bool is_resident) {
  const int size = is_resident ? slice_size(classes, blocks) : 0;
  const int tiles = (size + kTile - 1) / kTile;
  return static_cast<int>(sizeof(Room)) + 2 * size * size_of(logits) + 8 * tiles;
}

// The same number in all threads of the block, added up in one order.
template <bool kIsMax, int kCount>
MODXFER_DEVICE void reduce_block(float* values, float* warps) {
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  MODXFER_UNROLL
  for (int i = 0; i < kCount; ++i) {
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      const float other = device::from_lane_xor(values[i], mask);
      values[i] = kIsMax ? vmax(other, values[i]) : values[i] + other;
    }
  }
  device::sync_block();  // the values of the last reduction are read
  if (lane == 0) {
    MODXFER_UNROLL
    for (int i = 0; i < kCount; ++i) warps[warp * kCount + i] = values[i];
  }
  device::sync_block();
  const int num_warps = device::block_size() / kLanes;
  MODXFER_UNROLL
  for (int i = 0; i < kCount; ++i) {
    float total = warps[i];
    for (int w = 1; w < num_warps; ++w) {
      const float other = warps[w * kCount + i];
      total = kIsMax ? vmax(other, total) : total + other;
    }
    values[i] = total;
  }
}

// Gives every block the values of each: [blocks, kCount] of its shared memory.
template <int kCount>
MODXFER_DEVICE void exchange(const float* values, float* all) {
  if (device::thread_index() < device::cluster_size()) {
    float* there = device::of_rank(all, device::thread_index()) + device::cluster_rank() * kCount;
    MODXFER_UNROLL
    for (int i = 0; i < kCount; ++i) there[i] = values[i];
  }
  device::sync_cluster();
}

MODXFER_DEVICE void put(void* values, Kind kind, int64_t i, float value) {
  if (kind == Kind::kFloat) {
    static_cast<float*>(values)[i] = value;
  } else if (kind == Kind::kBf16) {
    static_cast<device::Bf16*>(values)[i] = device::to_bf16(value);
  } else {
    static_cast<device::Half*>(values)[i] = device::to_half(value);
  }
}

// Of the part whose divergence is kId or a later one. u = q - p in the place of -p: equal rows have
// no gradient, to the bit.
template <int64_t kId>
MODXFER_DEVICE void add_part(const Class& x, const KdSummand& part, Terms& sum) {
  if constexpr (kId < kNumSums) {
    constexpr auto kDivergence = static_cast<Divergence>(kId);
    if (part.divergence != kDivergence) return add_part<kId + 1>(x, part, sum);
    const Terms terms = divergence_terms<kDivergence>(x, part);
    sum.f += part.weight * terms.f;
    sum.u += part.weight * (kDivergence == Divergence::kForwardKl ? terms.u + x.q : terms.u);
  }
}

// f and u of a class for one divergence or, for kCount, of a weighted sum.
template <Divergence kDivergence>
MODXFER_DEVICE Terms terms_of(const Class& x, const KdRows& rows) {
  if constexpr (kDivergence != Divergence::kCount) {
    return divergence_terms<kDivergence>(x, rows.spec);
  } else {
    Terms sum{};
    for (int k = 0; k < rows.spec.num_parts; ++k) add_part<0>(x, rows.parts[k], sum);
    return sum;
  }
}

#include "kd_loss_sides.cuh"

template <Divergence kDivergence, bool kIsResident>
MODXFER_KERNEL void kd_loss_rows(MODXFER_ARGUMENT KdRows rows) {
  constexpr bool kIsForwardKl = kDivergence == Divergence::kForwardKl;
  KdSpec spec = rows.spec;
  Room& room = *reinterpret_cast<Room*>(device::shared_memory());
  Sides<kIsResident> sides(rows, device::shared_memory() + sizeof(Room));
  const bool leads = device::thread_index() == 0;
  const bool has_all = rows.num_extras > 1;
  const bool needs_x = has_all || spec.label_smoothing != 0.0f;
  const int stride = device::num_clusters();
  sides.init();
  if (leads && device::cluster_index() < rows.rows) {
    for (int tile = 0; tile < sides.num_tiles(); ++tile) sides.load(device::cluster_index(), tile);
  }
  int turn = 0;
  for (int row = device::cluster_index(); row < rows.rows; row += stride, ++turn) {
    int64_t label = rows.labels == nullptr ? -1 : rows.labels[row];
    if (label >= rows.classes) label = -1;
    if (rows.softening != nullptr) {
      spec.inv_temperature = 1.0f / rows.softening[2 * row];
      spec.kd_weight = rows.spec.kd_weight * rows.softening[2 * row + 1];
    }
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
          if (sides.begin() + i + k == label) part.z_label = z_s.of[k];
        }
      });
    }
    float* tops = &part.top_s;
    float both[kTops] = {part.top_s, part.top_t};
    reduce_block<true, kTops>(both, room.warps);
    raise(part, both[0], both[1], rate, count);
    reduce_block<false, kSums>(tops + kTops, room.warps);
    exchange<kPart>(tops, room.first);
    RowPart whole = {kNoTop, kNoTop};
    for (int rank = 0; rank < device::cluster_size(); ++rank) {
      const auto& other = *reinterpret_cast<const RowPart*>(room.first + rank * kPart);
      whole.top_s = vmax(other.top_s, whole.top_s);
      whole.top_t = vmax(other.top_t, whole.top_t);
    }
    const int per_block = slice_size(rows.classes, device::cluster_size());
    for (int rank = 0; rank < device::cluster_size(); ++rank) {
      RowPart other = *reinterpret_cast<const RowPart*>(room.first + rank * kPart);
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
    const int64_t first = row * rows.dlogits_stride + sides.begin();
    for (int tile = 0; tile < sides.num_tiles(); ++tile) {
      if (rows.dlogits != nullptr) {
        sides.for_each_step(tile, [&](int i, int n) {
          Four z_s, z_t;
          if (weight != 0.0f && n > 0) sides.read(row, i, n, true, z_s, z_t);
          // halves over the floats that they are made of: those of a step are read before
          if (!kIsResident) device::sync_block();
          MODXFER_UNROLL
          for (int k = 0; k < 4; ++k) {
            if (k >= n) break;
            float dz = 0.0f;  // an ignored row may hold anything, NaN included
            if (weight != 0.0f) {
              const Class x = class_of(z_s.of[k], z_t.of[k]);
              const Terms terms = terms_of<kDivergence>(x, rows);
              dz = kd_scale * (terms.u - x.q * u_sum) - shift;
              if (q1_scale != 0.0f) {
                const float x_s = z_s.of[k] - whole.top_s;
                dz += q1_scale * (needs_d1 ? device::exp2_approx((x_s - logd_1) * kLog2E) : x.q);
              }
              if (sides.begin() + i + k == label) dz -= of_label;
              if (!rows.student_bend.is_identity()) dz *= bend_slope(z_s.of[k], rows.student_bend);
            }
            put(rows.dlogits, rows.kind, first + i + k, dz);
          }
        });
      }
      const int next = row + stride;
      if (kIsResident && next < rows.rows) {
        device::sync_block();  // the tile is done with
        if (leads) {
          device::fence_copies();
          sides.load(next, tile);
        }
      }
    }
  }
}

}  // namespace modxfer::cuda
