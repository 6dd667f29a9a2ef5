// What the rows of a loss on logits are given, and the terms of a class. Torch-free.
#pragma once

#include "modxfer/kd_loss.h"
#include "rows.cuh"

namespace modxfer::cuda {

#include "modxfer/kd_loss_terms.h"

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

// -1 of a row that has none.
MODXFER_DEVICE int label_of(const KdRows& rows, int row) {
  const int64_t label = rows.labels == nullptr ? -1 : rows.labels[row];
  return 0 <= label && label < rows.classes ? static_cast<int>(label) : -1;
}

// Gives `spec` the temperature of a row that has one of its own, and its weight of the divergence.
MODXFER_DEVICE void soften(const KdRows& rows, int row, KdSpec& spec) {
  if (rows.softening == nullptr) return;
  spec.inv_temperature = 1.0f / rows.softening[2 * row];
  spec.kd_weight = rows.spec.kd_weight * rows.softening[2 * row + 1];
}

// Writes a row of dlogits and makes room for the next one, tile by tile. gradient(i, z...): dlogits
// of class i in the student's logit as the loss sees it, from that of each side.
template <int kSides, bool kIsResident, class Gradient>
MODXFER_DEVICE void write_row(Sides<kSides, kIsResident>& sides, int row, const KdRows& rows,
                              const Target& target, float weight, const Gradient& gradient) {
  for (int tile = 0; tile < sides.num_tiles(); ++tile) {
    if (rows.dlogits != nullptr) {
      sides.for_each_step(tile, [&](int i, int n) {
        Four z[kSides], dlogits = {};  // an ignored row may hold anything, NaN included
        if (weight != 0.0f && n > 0) {
          sides.read(row, i, n, true, z);
          MODXFER_UNROLL
          for (int k = 0; k < 4; ++k) {
            if (k >= n) break;
            const int at = sides.begin() + i + k;
            if constexpr (kSides == 1) {
              dlogits.of[k] = gradient(at, z[0].of[k]);
            } else {
              dlogits.of[k] = gradient(at, z[0].of[k], z[1].of[k]);
            }
            if (!rows.student_bend.is_straight()) {
              dlogits.of[k] *= bend_slope(z[0].of[k], rows.student_bend);
            }
          }
        }
        // halves over the floats that they are made of: those of a step are read before
        if (!kIsResident) device::sync_block();
        target.put(row, sides.begin() + i, n, dlogits);
      });
    }
    sides.refill(tile, row, rows.rows);
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

}  // namespace modxfer::cuda
