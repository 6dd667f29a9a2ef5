// The three steps of a row by the blocks that share it: the fused kernel takes them one after
// another, those of kd_loss_stages.cuh one each. Torch-free.
#pragma once

#include "kd_loss_args.cuh"

namespace modxfer::cuda {

#include "modxfer/kd_loss_of_logits.h"
#include "modxfer/kd_loss_of_row.h"

constexpr int kPart = 11;  // numbers that blocks exchange at once, at most

// Of a block's shared memory, behind its slices.
struct Room {
  float warps[kMaxWarps * kPart];
  float told[2][kMaxBlocks * kPart];  // what the blocks tell one another, in turns
};

constexpr int kRoomBytes = sizeof(Room);

// The bytes that a block needs.
inline int shared_bytes(int classes, int blocks, Kind logits, bool is_resident) {
  return kRoomBytes + (is_resident ? slices_bytes(2, classes, blocks, logits) : 0);
}

MODXFER_DEVICE Side student_of(const KdRows& rows) {
  return {rows.student, rows.student_stride, rows.logits, rows.student_bend};
}
MODXFER_DEVICE Side teacher_of(const KdRows& rows) {
  return {rows.teacher, rows.teacher_stride, rows.logits, rows.teacher_bend};
}

template <bool kIsResident>
struct Block {
  Room& room;
  Sides<2, kIsResident> sides;
  int turn = 0;       // rows that it is done with
  int exchanges = 0;  // a slot is free once all have come to the exchange after it

  MODXFER_DEVICE explicit Block(const KdRows& rows)
      : room(*reinterpret_cast<Room*>(device::shared_memory())),
        sides({student_of(rows), teacher_of(rows)}, rows.classes,
              device::shared_memory() + sizeof(Room)) {}

  // [blocks, kCount], the values of each.
  template <int kCount>
  MODXFER_DEVICE const float* tell(const float* values) {
    static_assert(kCount <= kPart);
    float* all = room.told[exchanges++ & 1];
    exchange<kCount>(values, all);
    return all;
  }

  // Of all threads of all blocks, added up in one order.
  template <int kCount>
  MODXFER_DEVICE void add_up(float* sums) {
    reduce_block<false, kCount>(sums, room.warps);
    const float* all = tell<kCount>(sums);
    MODXFER_UNROLL
    for (int i = 0; i < kCount; ++i) {
      sums[i] = 0.0f;
      for (int rank = 0; rank < device::cluster_size(); ++rank) sums[i] += all[rank * kCount + i];
    }
  }
};

struct Row {
  int index;
  int label;  // below 0: it has no cross entropy
  float inv_t;
  float kd_weight;
};

MODXFER_DEVICE Row row_of(const KdRows& rows, int index, int label) {
  KdSpec spec = rows.spec;
  soften(rows, index, spec);
  return {index, label, spec.inv_temperature, spec.kd_weight};
}

// --- stats

// What a thread, then a block, then a row knows of the classes so far. Sums are relative to the
// tops.
struct RowPart {
  float top_s, top_t;
  float d_s, d_t;      // of e^((z - top) / temperature)
  float d_1;           // of e^(z_s - top_s)
  float cross;         // of a KL from a to b: of e_a (x_a - x_b), x = z - top
  float e_x_s, e_x_t;  // of e x
  float x_sum;         // of z_s - top_s
  float z_label;
  float shared;  // more than 0 where a class is the largest of both
};
constexpr int kTops = 2, kSums = sizeof(RowPart) / sizeof(float) - kTops;
static_assert(kTops + kSums == kPart);

// A KL is a mean under p or q, which the statistics have.
constexpr bool is_kl(Divergence divergence) {
  return divergence == Divergence::kForwardKl || divergence == Divergence::kReverseKl;
}

// Makes the sums of `count` classes relative to larger tops.
template <Divergence kDivergence>
MODXFER_DEVICE void raise(RowPart& part, float top_s, float top_t, float rate, int count) {
  constexpr bool kUnderP = kDivergence == Divergence::kForwardKl;
  if (top_s > part.top_s) {
    const float less = part.top_s - top_s;
    const float factor = device::exp2_approx(less * rate);
    if constexpr (kUnderP) {
      if (part.d_t != 0.0f) part.cross -= less * part.d_t;
    } else if constexpr (is_kl(kDivergence)) {
      part.cross = factor == 0.0f ? 0.0f : factor * (part.cross + less * part.d_s);
    }
    part.e_x_s = factor == 0.0f ? 0.0f : factor * (part.e_x_s + less * part.d_s);
    part.d_s *= factor;
    part.d_1 *= device::exp2_approx(less * kLog2E);
    if (count > 0) part.x_sum += less * static_cast<float>(count);
    part.shared = 0.0f;
    part.top_s = top_s;
  }
  if (top_t > part.top_t) {
    const float less = part.top_t - top_t;
    const float factor = device::exp2_approx(less * rate);
    if constexpr (kUnderP) {
      part.cross = factor == 0.0f ? 0.0f : factor * (part.cross + less * part.d_t);
    } else if constexpr (is_kl(kDivergence)) {
      if (part.d_s != 0.0f) part.cross -= less * part.d_s;
    }
    part.e_x_t = factor == 0.0f ? 0.0f : factor * (part.e_x_t + less * part.d_t);
    part.d_t *= factor;
    part.shared = 0.0f;
    part.top_t = top_t;
  }
}

// Of the whole row. needs_x: also the sums of x, and `shared`.
template <Divergence kDivergence, bool kIsResident>
MODXFER_DEVICE RowPart stats_of(const KdRows& rows, Block<kIsResident>& block, const Row& row,
                                bool needs_d1, bool needs_x) {
  constexpr bool kUnderP = kDivergence == Divergence::kForwardKl;
  auto& sides = block.sides;
  const float rate = row.inv_t * kLog2E;
  RowPart part = {kNoTop, kNoTop};
  int count = 0;
  for (int tile = 0; tile < sides.num_tiles(); ++tile) {
    sides.wait(tile, block.turn);
    sides.for_each_four(tile, [&](int i, int n) {
      Four z[2];
      sides.read(row.index, i, n, false, z);
      const auto& [z_s, z_t] = z;
      float top_s = kNoTop, top_t = kNoTop;
      for (int k = 0; k < 4; ++k) {
        top_s = vmax(z_s.of[k], top_s);
        top_t = vmax(z_t.of[k], top_t);
      }
      raise<kDivergence>(part, top_s, top_t, rate, count);
      count += n;
      MODXFER_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (k >= n) break;
        const float x_s = z_s.of[k] - part.top_s, x_t = z_t.of[k] - part.top_t;
        const float e_s = device::exp2_approx(x_s * rate), e_t = device::exp2_approx(x_t * rate);
        part.d_s += e_s;
        part.d_t += e_t;
        if (needs_d1) part.d_1 += device::exp2_approx(x_s * kLog2E);
        if constexpr (kUnderP) {
          part.cross += e_t == 0.0f ? 0.0f : e_t * (x_t - x_s);
        } else if constexpr (is_kl(kDivergence)) {
          part.cross += e_s == 0.0f ? 0.0f : e_s * (x_s - x_t);
        }
        if (needs_x) {
          part.x_sum += x_s;
          part.e_x_s += e_s == 0.0f ? 0.0f : e_s * x_s;
          part.e_x_t += e_t == 0.0f ? 0.0f : e_t * x_t;
          if (x_s == 0.0f && x_t == 0.0f) part.shared = 1.0f;
        }
      }
      pick(z_s, row.label - sides.begin() - i, part.z_label);
    });
  }
  ++block.turn;
  float* numbers = &part.top_s;
  float tops[kTops] = {part.top_s, part.top_t};
  reduce_block<true, kTops>(tops, block.room.warps);
  raise<kDivergence>(part, tops[0], tops[1], rate, count);
  reduce_block<false, kSums>(numbers + kTops, block.room.warps);
  const float* all = block.template tell<kPart>(numbers);
  RowPart whole = {kNoTop, kNoTop};
  for (int rank = 0; rank < device::cluster_size(); ++rank) {
    const auto& other = *reinterpret_cast<const RowPart*>(all + rank * kPart);
    whole.top_s = vmax(other.top_s, whole.top_s);
    whole.top_t = vmax(other.top_t, whole.top_t);
  }
  const int per_block = slice_size(rows.classes, device::cluster_size());
  for (int rank = 0; rank < device::cluster_size(); ++rank) {
    RowPart other = *reinterpret_cast<const RowPart*>(all + rank * kPart);
    const int left = rows.classes - rank * per_block;
    const int own = left < per_block ? (left < 0 ? 0 : left) : per_block;
    raise<kDivergence>(other, whole.top_s, whole.top_t, rate, own);
    float* to = &whole.top_s;
    const float* from = &other.top_s;
    MODXFER_UNROLL
    for (int i = kTops; i < kPart; ++i) to[i] += from[i];
  }
  return whole;
}

// --- sums

// What the classes of a row are made of.
struct Softmaxes {
  float top_s, logd_s, top_t, logd_t;
  float logd_gap;  // logd_t - logd_s
  float inv_s, inv_d_t;
  float inv_t;

  MODXFER_DEVICE Class at(float z_s, float z_t) const {
    const float x_s = z_s - top_s, x_t = z_t - top_t, rate = inv_t * kLog2E;
    const float d = (x_t - x_s) * inv_t - logd_gap;  // 0 of equal ones, to the bit
    return {device::exp2_approx(x_s * rate) * inv_s, device::exp2_approx(x_t * rate) * inv_d_t, d,
            x_s * inv_t - logd_s, x_t * inv_t - logd_t};
  }
};

MODXFER_DEVICE Softmaxes softmaxes_of(const RowPart& whole, float inv_t) {
  const float inv_s = 1.0f / whole.d_s;
  return {whole.top_s,
          device::log(whole.d_s),
          whole.top_t,
          device::log(whole.d_t),
          device::log(whole.d_t * inv_s),
          inv_s,
          1.0f / whole.d_t,
          inv_t};
}

// Calls body(z_s, z_t) for this thread's classes of a row that it has read before.
template <bool kIsResident, class Body>
MODXFER_DEVICE void for_each_class(Block<kIsResident>& block, const Row& row, const Body& body) {
  auto& sides = block.sides;
  for (int tile = 0; tile < sides.num_tiles(); ++tile) {
    sides.for_each_four(tile, [&](int i, int n) {
      Four z[2];
      sides.read(row.index, i, n, true, z);
      MODXFER_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (k < n) body(z[0].of[k], z[1].of[k]);
      }
    });
  }
}

template <Divergence kDivergence, bool kIsResident>
MODXFER_DEVICE Terms sums_of_terms(const KdRows& rows, Block<kIsResident>& block, const Row& row,
                                   const Softmaxes& softmax) {
  float sums[2] = {};
  for_each_class(block, row, [&](float z_s, float z_t) {
    const Terms terms = terms_of<kDivergence>(softmax.at(z_s, z_t), rows);
    sums[0] += terms.f;
    sums[1] += terms.u;
  });
  block.template add_up<2>(sums);
  return {sums[0], sums[1]};
}

// Those of add_of_row, and the largest logarithm that they are relative to.
struct OfRowPart {
  float top;
  OfRowTerms sums;

  template <Divergence kDivergence>
  MODXFER_DEVICE void raise(float higher) {
    if (!(higher > top)) return;
    const float factor = vexp(top - higher);
    sums.s *= factor;
    if constexpr (kDivergence == Divergence::kNegativeLogAcceptance) sums.first *= factor;
    top = higher;
  }
};

template <Divergence kDivergence, bool kIsResident>
MODXFER_DEVICE KdRowSums<float> sums_of_row(const KdRows& rows, Block<kIsResident>& block,
                                            const Row& row, const Softmaxes& softmax) {
  constexpr bool kHasTop = kDivergence != Divergence::kLkHybrid;
  constexpr int kCount = sizeof(OfRowPart) / sizeof(float);
  OfRowPart part = {kNoTop};
  for_each_class(block, row, [&](float z_s, float z_t) {
    const Class x = softmax.at(z_s, z_t);
    if constexpr (kHasTop) {
      part.template raise<kDivergence>(log_addend<kDivergence>(x, rows.spec));
    }
    add_of_row<kDivergence, true>(x, part.top, rows.spec, part.sums);
  });
  float* numbers = &part.top;
  if constexpr (kHasTop) {
    float top[1] = {part.top};
    reduce_block<true, 1>(top, block.room.warps);
    part.template raise<kDivergence>(top[0]);
  }
  reduce_block<false, kCount - 1>(numbers + 1, block.room.warps);
  const float* all = block.template tell<kCount>(numbers);
  OfRowPart whole = {kNoTop};
  for (int rank = 0; rank < device::cluster_size(); ++rank) {
    whole.top = vmax(all[rank * kCount], whole.top);
  }
  for (int rank = 0; rank < device::cluster_size(); ++rank) {
    OfRowPart other = *reinterpret_cast<const OfRowPart*>(all + rank * kCount);
    if constexpr (kHasTop) other.template raise<kDivergence>(whole.top);
    float* to = &whole.top;
    const float* from = &other.top;
    MODXFER_UNROLL
    for (int i = 1; i < kCount; ++i) to[i] += from[i];
  }
  const OfRowTerms& of = whole.sums;
  KdRowSums<float> sums = {of.s, of.first, of.second, of.variation, of.signed_sum};
  take_logarithms<kDivergence>(whole.top, sums);
  return sums;
}

// Sum of (z near)^2 of logits whose largest size is `most`.
struct Length {
  float most = kLeastSize;
  float near = near_of(kLeastSize);
  float squared = 0.0f;

  MODXFER_DEVICE void raise(float larger) {
    if (!(larger > most)) return;
    const float closer = near_of(larger), factor = closer / near;
    squared *= factor * factor;
    most = larger;
    near = closer;
  }
};

struct LogitScales {
  LogitScale s, t;
};

template <bool kIsResident>
MODXFER_DEVICE LogitScales unit_rows(Block<kIsResident>& block, const Row& row) {
  Length of_s, of_t;
  for_each_class(block, row, [&](float z_s, float z_t) {
    z_s = without_excluded(z_s);
    z_t = without_excluded(z_t);
    of_s.raise(vabs(z_s));
    of_t.raise(vabs(z_t));
    of_s.squared += z_s * of_s.near * (z_s * of_s.near);
    of_t.squared += z_t * of_t.near * (z_t * of_t.near);
  });
  float most[2] = {of_s.most, of_t.most};
  reduce_block<true, 2>(most, block.room.warps);
  of_s.raise(most[0]);
  of_t.raise(most[1]);
  float squared[2] = {of_s.squared, of_t.squared};
  reduce_block<false, 2>(squared, block.room.warps);
  const float own[4] = {most[0], most[1], squared[0], squared[1]};
  const float* all = block.template tell<4>(own);
  Length row_s, row_t;
  for (int rank = 0; rank < device::cluster_size(); ++rank) {
    row_s.raise(all[4 * rank]);
    row_t.raise(all[4 * rank + 1]);
  }
  for (int rank = 0; rank < device::cluster_size(); ++rank) {
    const float* of = all + 4 * rank;
    const float less_s = row_s.near / near_of(of[0]), less_t = row_t.near / near_of(of[1]);
    row_s.squared += less_s * less_s * of[2];
    row_t.squared += less_t * less_t * of[3];
  }
  return {unit_scale(row_s.near, row_s.squared), unit_scale(row_t.near, row_t.squared)};
}

struct Gaps {
  LogitScales scales;
  float squares;
};

// Of a divergence of logits: what the rows are compared by, and the sum of squared gaps.
template <Divergence kDivergence, bool kIsResident>
MODXFER_DEVICE Gaps gaps_of(Block<kIsResident>& block, const Row& row) {
  LogitScales scales = {{1.0f, row.inv_t}, {1.0f, row.inv_t}};
  if constexpr (kDivergence == Divergence::kLogitsCosine) scales = unit_rows(block, row);
  float squares[1] = {};
  for_each_class(block, row, [&](float z_s, float z_t) {
    const float gap = logit_gap(z_s, z_t, scales.s, scales.t).gap;
    squares[0] += gap * gap;
  });
  block.template add_up<1>(squares);
  return {scales, squares[0]};
}

// What u of a class is made of beside the class.
struct OfU {
  float sum;           // of u over the row
  KdOfRow of_row;      // of a divergence that is one
  LogitScales scales;  // of one of the logits
  float factor, back;
};

struct Value {
  float kd;
  OfU of_u;
};

template <Divergence kDivergence>
MODXFER_DEVICE float u_of(const Class& x, float z_s, float z_t, const KdRows& rows,
                          const OfU& of_u) {
  if constexpr (is_of_row(kDivergence)) {
    return of_row_u<kDivergence>(x, of_u.of_row, rows.spec);
  } else if constexpr (is_of_logits(kDivergence)) {
    const LogitGap of = logit_gap(z_s, z_t, of_u.scales.s, of_u.scales.t);
    return of_u.factor * (of.gap - of_u.back * of.x);
  } else {
    return terms_of<kDivergence>(x, rows).u;
  }
}

template <Divergence kDivergence, bool kIsResident>
MODXFER_DEVICE Value value_of(const KdRows& rows, Block<kIsResident>& block, const Row& row,
                              const RowPart& whole, const Softmaxes& softmax) {
  Value value = {};
  if constexpr (kDivergence == Divergence::kForwardKl) {
    value.kd = whole.cross * softmax.inv_d_t * row.inv_t - softmax.logd_gap;
    value.of_u.sum = -1.0f;
  } else if constexpr (kDivergence == Divergence::kReverseKl) {
    value.kd = whole.cross * softmax.inv_s * row.inv_t + softmax.logd_gap;
    value.of_u.sum = value.kd;
  } else if constexpr (is_of_row(kDivergence)) {
    const KdRowSums<float> sums = sums_of_row<kDivergence>(rows, block, row, softmax);
    const KdSums<float> of = of_sums<kDivergence>(sums, rows.spec, value.of_u.of_row);
    value.kd = of.kd;
    value.of_u.sum = of.u;
  } else if constexpr (is_of_logits(kDivergence)) {
    const Gaps gaps = gaps_of<kDivergence>(block, row);
    const LogitScales& scales = gaps.scales;
    const OfLogits<float> of = of_squares<kDivergence>(
        gaps.squares, static_cast<float>(rows.classes), scales.s, scales.t, row.inv_t);
    value.of_u.scales = scales;
    // there is no softmax for a sum of u to go through; NaN of a row with NaN, +inf or no class
    value.of_u.sum = 0.0f * (softmax.logd_s + softmax.logd_t);
    value.kd = of.kd + value.of_u.sum;
    value.of_u.factor = of.factor;
    value.of_u.back = of.back;
  } else {
    const Terms sums = sums_of_terms<kDivergence>(rows, block, row, softmax);
    value.kd = sums.f;
    value.of_u.sum = sums.u;
  }
  return value;
}

// --- write

// dlogits of a row.
template <Divergence kDivergence, bool kIsResident>
MODXFER_DEVICE void write_of(const KdRows& rows, Block<kIsResident>& block, const Row& row,
                             const Softmaxes& softmax, const OfU& of_u, float logd_1) {
  const KdSpec& spec = rows.spec;
  const float weight = rows.dlogits == nullptr ? 0.0f : rows.row_weights[row.index];
  const float kd_scale = weight * row.kd_weight * row.inv_t;
  const float ce_scale = row.label >= 0 ? weight * spec.ce_weight : 0.0f;
  float q1_scale = ce_scale;
  if (spec.z_loss_weight != 0.0f) {
    q1_scale += 2.0f * weight * spec.z_loss_weight * (softmax.top_s + logd_1);
  }
  // at temperature 1 too where q is of some of the classes
  const bool is_same = row.inv_t == 1.0f && logd_1 == softmax.logd_s;
  const float shift = ce_scale * spec.label_smoothing / spec.classes;
  const float of_label = ce_scale * (1.0f - spec.label_smoothing);
  const Target target(rows.dlogits, rows.dlogits_stride, rows.kind);
  write_row(block.sides, row.index, rows, target, weight, [&](int i, float z_s, float z_t) {
    const Class x = softmax.at(z_s, z_t);
    const float u = u_of<kDivergence>(x, z_s, z_t, rows, of_u);
    float dz = kd_scale * (u - x.q * of_u.sum) - shift;
    if (q1_scale != 0.0f) {
      const float x_s = z_s - softmax.top_s;
      dz += q1_scale * (is_same ? x.q : device::exp2_approx((x_s - logd_1) * kLog2E));
    }
    return i == row.label ? dz - of_label : dz;
  });
}

}  // namespace modxfer::cuda
