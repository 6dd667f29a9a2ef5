// KD loss of one row of logits: scalars, statistics and the kernels' signatures. Torch-free.
#pragma once

#include <cstdint>

#include "modxfer/kd_loss_stages.h"
#include "modxfer/topk_kd_loss.h"

namespace modxfer {

// In the order of kernels/divergences.py, which has their formulas.
enum class Divergence : int64_t {
  kForwardKl,
  kReverseKl,
  kJsd,
  kTotalVariation,
  kSkewForwardKl,
  kSkewReverseKl,
  kJeffreys,
  kSquaredHellinger,
  kChiSquared,
  kAlphaBeta,
  kRenyi,
  kNegativeLogAcceptance,
  kLkHybrid,
  kLogitsMse,
  kLogitsCosine,
  kCount
};

constexpr int64_t kNumDivergences = static_cast<int64_t>(Divergence::kCount);
// The first ones are sums over the classes; then functions of such sums; two are of the logits.
constexpr int64_t kNumSums = static_cast<int64_t>(Divergence::kRenyi);

constexpr bool is_of_row(Divergence divergence) {
  return divergence >= Divergence::kRenyi && divergence <= Divergence::kLkHybrid;
}
constexpr bool is_of_logits(Divergence divergence) {
  return divergence == Divergence::kLogitsMse || divergence == Divergence::kLogitsCosine;
}

// `num_sums` and `num_numbers` of a divergence's record; without one there are sums of f and u.
constexpr int64_t num_sums(Divergence divergence) {
  if (divergence == Divergence::kLogitsCosine) return 3;
  return is_of_row(divergence) ? int64_t{sizeof(KdRowSums<float>) / sizeof(float)} : 2;
}
constexpr int64_t num_numbers(Divergence divergence) {
  if (divergence == Divergence::kLogitsCosine) return 3;
  if (divergence == Divergence::kLogitsMse) return 1;
  return is_of_row(divergence) ? 2 : 0;
}

// One divergence of a weighted sum, with its constants.
struct KdSummand {
  Divergence divergence;
  float weight;
  float c0;
  float c1;
  float c2;
  float c3;
};

// What is computed. p teacher, q student; c0 to c3 are the constants of the divergence's record: of
// a mixture the weights of p and q, rounded once each, and their logarithms.
struct KdSpec {
  Divergence divergence;
  float c0;
  float c1;
  float c2;
  float c3;
  float inv_temperature;
  float rate;  // log2(e) / temperature, of `vexp_below`
  float kd_weight;
  float ce_weight;
  float label_smoothing;
  float z_loss_weight;
  float classes;           // of the whole row: V, or more where a rank has a part of it
  const KdSummand* parts;  // of a weighted sum, whose divergence is kCount
  int64_t num_parts;
};

// By-products of a row; the order of the op's extras tensor.
struct KdExtras {
  float lse;  // log sum exp z_s, alone where nothing else is asked for
  float label_log_prob;
  float is_label_top;
  float student_entropy;
  float teacher_entropy;
  float is_top_shared;
};

// What the backward of a row needs of its forward; the order of the op's stats tensor.
struct KdStats {
  float max_s;
  float logd_s;  // log sum exp((z_s - max_s) / temperature)
  float max_t;
  float logd_t;
  float u_sum;   // sum of q dD/dq; 0 of a divergence of the logits
  float logd_1;  // log sum exp(z_s - max_s), computed when there is a term at temperature 1
};

struct KdLosses {
  float kd;
  float ce;
};

// Of a row: the divergence, and the sum of q dD/dq.
template <class Number>
struct KdSums {
  Number kd;
  Number u;
};

// Two rows of V floats: q and u of each class between the passes over a row, up to a factor.
struct KdScratch {
  float* q;
  float* u;
  float q_factor = 1.0f;
  float u_factor = 1.0f;
};

// Row kernels of one divergence and instruction set. label < 0: the row has no cross entropy.
struct KdRowKernels {
  const char* isa;
  // Losses, statistics, and q and u in the scratch; by whether label smoothing or extras are asked
  // for. The lse of extras is written by both.
  KdLosses (*fwd[2])(const float* student, const float* teacher, int64_t V, int64_t label,
                     const KdSpec& spec, KdStats& stats, KdScratch& scratch, KdExtras* extras);
  // q and u again, from the statistics. numbers: `num_numbers` of the whole row, or null where the
  // V classes are it.
  void (*recompute)(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                    const KdStats& stats, const float* numbers, KdScratch& scratch);
  // dlogits from q and u; dlogits may be the student's row itself. A label of V or more is the
  // label of a class that these V are not.
  void (*grad)(const float* student, int64_t V, int64_t label, float row_weight, const KdSpec& spec,
               const KdStats& stats, const KdScratch& scratch, float* dlogits);
  // In stages, see kd_loss_stages_rows.h: statistics, by whether label smoothing or by-products are
  // asked for; and `num_sums` sums.
  void (*part[2])(const float* student, const float* teacher, int64_t V, int64_t label,
                  const KdSpec& spec, KdPart& part);
  void (*sums)(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
               const KdStats& stats, double* sums);
  // The same of a teacher that lists a few classes: losses, log sum exp of the student where asked
  // for, statistics and the scratch, and from these dlogits, which may be the student's row itself.
  KdLosses (*topk_fwd)(const float* student, int64_t V, const TopKRow& teacher, int64_t label,
                       const KdSpec& spec, TopKStats& stats, const TopKScratch& scratch,
                       float* lse);
  void (*topk_grad)(const float* student, int64_t V, const TopKRow& teacher, int64_t label,
                    float row_weight, const KdSpec& spec, const TopKStats& stats,
                    const TopKScratch& scratch, float* dlogits);
};

// The kernels of a divergence for the instruction set in use.
const KdRowKernels& kd_row_kernels(Divergence divergence);

}  // namespace modxfer
