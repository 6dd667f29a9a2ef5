// Row kernels of the KD loss. Included once per instruction set after vec.h, by each_isa.h.
//
//   forward     1. maxima   2. e^x and its sums   3. q and u per class, their sums
//   recompute   q and u per class from the statistics of an earlier forward
//   gradient    dlogits from q and u
//
// The forward KL has no pass 3: u is -p, and the divergence a mean under p that pass 2 sums.
//
// Per-class values stay in a scratch of two rows per thread. At V = 32k the pair of logits and the
// scratch are 512 KB and live in the second-level cache: memory sees each logit once, and each
// exponential is computed once.
// Sums run in float over kBlock elements and in double across blocks: the loss of a close student
// is a small difference of large sums.

#include "modxfer/kd_loss_terms.h"

// Of a part of a weighted sum. u = q - p in the place of -p: equal rows have no gradient, to the
// bit
template <Divergence kDivergence>
Terms part_terms(const Class& x, const KdSummand& part) {
  Terms terms = divergence_terms<kDivergence>(x, part);
  if constexpr (kDivergence == Divergence::kForwardKl) terms.u += x.q;
  return terms;
}

using PartTerms = Terms (*)(const Class&, const KdSummand&);

template <int64_t... kIds>
constexpr std::array<PartTerms, sizeof...(kIds)> part_terms_of(
    std::integer_sequence<int64_t, kIds...>) {
  return {part_terms<static_cast<Divergence>(kIds)>...};
}

// Those of sums over the classes.
constexpr auto kPartTerms = part_terms_of(std::make_integer_sequence<int64_t, kNumSums>{});

// Of one divergence, or, for kCount, of a weighted sum.
template <Divergence kDivergence>
MODXFER_INLINE Terms class_terms(const Class& x, const KdSpec& spec) {
  if constexpr (kDivergence != Divergence::kCount) {
    return divergence_terms<kDivergence>(x, spec);
  } else {
    Terms sum{};
    for (int64_t k = 0; k < spec.num_parts; ++k) {
      const KdSummand& part = spec.parts[k];
      const Terms terms = kPartTerms[static_cast<size_t>(part.divergence)](x, part);
      sum.f += part.weight * terms.f;
      sum.u += part.weight * terms.u;
    }
    return sum;
  }
}

// Logits past the end of the row are -inf, classes without probability.
MODXFER_INLINE vf load_n(const float* src, int n) {
  return n == kLanes ? load(src) : load_tail(src, n, -__builtin_inff());
}

// What passes 1 and 2 leave beside the statistics.
struct Softmaxes {
  double d_s, d_t;
  double logd_gap;  // log d_t - log d_s
  double mean;      // of x_t - x_s under p, x being z less its maximum
  float ce;
};

// Passes 1 and 2: e^x of student and teacher in q and u of the scratch.
template <bool kMean, bool kMore>
Softmaxes softmaxes(const float* student, const float* teacher, int64_t V, int64_t label,
                    const KdSpec& spec, KdStats& stats, const KdScratch& scratch,
                    KdExtras* extras) {
  vf max_s = splat(-__builtin_inff()), max_t = max_s;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    max_s = vmax(load_n(student + i, n), max_s);
    max_t = vmax(load_n(teacher + i, n), max_t);
  });
  stats.max_s = reduce_max(max_s);
  stats.max_t = reduce_max(max_t);

  const bool has_ce = label >= 0 && spec.ce_weight != 0.0f;
  const bool needs_d1 =
      (has_ce || spec.z_loss_weight != 0.0f || extras != nullptr) && spec.inv_temperature != 1.0f;
  const Rate rate = rate_of(spec.rate), natural = natural_rate();
  const vf top_s = splat(stats.max_s), top_t = splat(stats.max_t);
  double d_s = 0, d_t = 0, d_1 = 0;
  double cross = 0;
  double x_sum = 0, e_x_s = 0, e_x_t = 0;  // of z_s - max_s; of e^x x at the temperature
  vi shared{};                             // classes that are the largest on both sides
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum_s{}, sum_t{}, sum_1{}, sum_cross{}, sum_x{}, sum_e_x_s{}, sum_e_x_t{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf x_s = load_n(student + i, n) - top_s;
      const vf x_t = load_n(teacher + i, n) - top_t;
      const vf e_s = vexp_below(x_s, rate);
      const vf e_t = vexp_below(x_t, rate);
      sum_s += e_s;
      sum_t += e_t;
      if (needs_d1) sum_1 += vexp_below(x_s, natural);
      if constexpr (kMean) sum_cross += select(e_t == 0.0f, vf{}, e_t * (x_t - x_s));
      if constexpr (kMore) {
        sum_x += n == kLanes ? x_s : load_tail(student + i, n, stats.max_s) - stats.max_s;
        sum_e_x_s += select(e_s == 0.0f, vf{}, e_s * x_s);
        sum_e_x_t += select(e_t == 0.0f, vf{}, e_t * x_t);
        shared |= (x_s == 0.0f) & (x_t == 0.0f);
      }
      store_n(scratch.q + i, n, e_s);
      store_n(scratch.u + i, n, e_t);
    });
    d_s += reduce_sum(sum_s);
    d_t += reduce_sum(sum_t);
    d_1 += reduce_sum(sum_1);
    if constexpr (kMean) cross += reduce_sum(sum_cross);
    if constexpr (kMore) {
      x_sum += reduce_sum(sum_x);
      e_x_s += reduce_sum(sum_e_x_s);
      e_x_t += reduce_sum(sum_e_x_t);
    }
  }
  const double logd_s = __builtin_log(d_s), logd_t = __builtin_log(d_t);
  const double logd_1 = needs_d1 ? __builtin_log(d_1) : logd_s;
  stats.logd_s = static_cast<float>(logd_s);
  stats.logd_t = static_cast<float>(logd_t);
  stats.logd_1 = static_cast<float>(logd_1);

  double ce = has_ce ? logd_1 - (static_cast<double>(student[label]) - stats.max_s) : 0.0;
  if constexpr (kMore) {
    const double mean = logd_1 - x_sum / static_cast<double>(V);
    if (has_ce && spec.label_smoothing != 0.0f) ce += spec.label_smoothing * (mean - ce);
    if (extras != nullptr) {
      const float x_label = label >= 0 ? student[label] - stats.max_s : 0.0f;
      extras->label_log_prob = label >= 0 ? static_cast<float>(x_label - logd_1) : 0.0f;
      extras->is_label_top = label >= 0 && x_label == 0.0f ? 1.0f : 0.0f;
      const double scale = spec.inv_temperature;
      extras->student_entropy = static_cast<float>(logd_s - scale * e_x_s / d_s);
      extras->teacher_entropy = static_cast<float>(logd_t - scale * e_x_t / d_t);
      extras->is_top_shared = 0.0f;
      for (int i = 0; i < kLanes; ++i)
        extras->is_top_shared = shared[i] ? 1.0f : extras->is_top_shared;
    }
  }
  if (extras != nullptr) extras->lse = static_cast<float>(stats.max_s + logd_1);
  return {d_s, d_t, logd_t - logd_s, cross / d_t, static_cast<float>(ce)};
}

// The class i of a row, and those of its vector.
MODXFER_INLINE Class class_at(const float* student, const float* teacher, int64_t i, int n,
                              const KdSpec& spec, const KdStats& stats, float logd_gap, vf q,
                              vf p) {
  const vf z_s = load_n(student + i, n) - stats.max_s;
  const vf z_t = load_n(teacher + i, n) - stats.max_t;
  const vf x_s = z_s * spec.inv_temperature, x_t = z_t * spec.inv_temperature;
  const vf d = (z_t - z_s) * spec.inv_temperature - logd_gap;  // 0 of equal ones, to the bit
  return {q, p, d, x_s - stats.logd_s, x_t - stats.logd_t};
}

// Pass 3: the divergence, sum u, and u of each class, from e^x of both sides; u may be where e_t
// is.
template <Divergence kDivergence>
KdSums<double> row_terms(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                         const KdStats& stats, const Softmaxes& softmax, const float* e_s,
                         const float* e_t, float* u) {
  const float inv_d_s = static_cast<float>(1.0 / softmax.d_s);
  const float inv_d_t = static_cast<float>(1.0 / softmax.d_t);
  const float logd_gap = static_cast<float>(softmax.logd_gap);
  const KdSpec own = spec;  // no store to u may change them
  const KdStats at = stats;
  double f_sum = 0, u_sum = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum_f{}, sum_u{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf q = load_or_zero(e_s + i, n) * inv_d_s;
      const vf p = load_or_zero(e_t + i, n) * inv_d_t;
      const Class x = class_at(student, teacher, i, n, own, at, logd_gap, q, p);
      const Terms terms = class_terms<kDivergence>(x, own);
      sum_f += terms.f;
      sum_u += terms.u;
      store_n(u + i, n, terms.u);
    });
    f_sum += reduce_sum(sum_f);
    u_sum += reduce_sum(sum_u);
  }
  // below 0 is rounding
  return {f_sum < 0.0 ? 0.0 : f_sum, kDivergence == Divergence::kForwardKl ? -1.0 : u_sum};
}

template <Divergence kDivergence, bool kMore>
KdLosses row_fwd(const float* student, const float* teacher, int64_t V, int64_t label,
                 const KdSpec& spec, KdStats& stats, KdScratch& scratch, KdExtras* extras) {
  constexpr bool kMean = kDivergence == Divergence::kForwardKl;
  const Softmaxes softmax =
      softmaxes<kMean, kMore>(student, teacher, V, label, spec, stats, scratch, extras);
  KdSums<double> sums;
  scratch.q_factor = static_cast<float>(1.0 / softmax.d_s);
  if constexpr (kMean) {
    scratch.u_factor = static_cast<float>(-1.0 / softmax.d_t);
    const double kd = softmax.mean * spec.inv_temperature - softmax.logd_gap;
    sums = {kd < 0.0 ? 0.0 : kd, -1.0};  // below 0 is rounding
  } else {
    scratch.u_factor = 1.0f;
    sums = row_terms<kDivergence>(student, teacher, V, spec, stats, softmax, scratch.q, scratch.u,
                                  scratch.u);
  }
  stats.u_sum = static_cast<float>(sums.u);
  return {static_cast<float>(sums.kd), softmax.ce};
}

// Classes i to i + n, from the statistics of the row.
MODXFER_INLINE Class class_of(const float* student, const float* teacher, int64_t i, int n,
                              const KdSpec& spec, const KdStats& stats) {
  const float logd_gap = stats.logd_t - stats.logd_s;
  const Rate natural = natural_rate();
  Class x = class_at(student, teacher, i, n, spec, stats, logd_gap, vf{}, vf{});
  x.q = vexp_below(x.log_q, natural);
  x.p = vexp_below(x.log_p, natural);
  return x;
}

template <Divergence kDivergence>
void row_recompute(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                   const KdStats& stats, const float*, KdScratch& scratch) {
  scratch.q_factor = scratch.u_factor = 1.0f;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    const Class x = class_of(student, teacher, i, n, spec, stats);
    store_n(scratch.q + i, n, x.q);
    store_n(scratch.u + i, n, class_terms<kDivergence>(x, spec).u);
  });
}

void row_grad(const float* student, int64_t V, int64_t label, float row_weight, const KdSpec& spec,
              const KdStats& stats, const KdScratch& scratch, float* dlogits) {
  const bool has_ce = label >= 0 && spec.ce_weight != 0.0f;
  const bool has_z = spec.z_loss_weight != 0.0f;
  // at temperature 1 too where q is of some of the classes
  const bool is_same = spec.inv_temperature == 1.0f && stats.logd_1 == stats.logd_s;
  const bool needs_q1 = (has_ce || has_z) && !is_same;
  const float kd_scale = row_weight * spec.kd_weight * spec.inv_temperature;
  const float ce_scale = has_ce ? row_weight * spec.ce_weight : 0.0f;
  float q1_scale = ce_scale;
  if (has_z) q1_scale += 2.0f * row_weight * spec.z_loss_weight * (stats.max_s + stats.logd_1);
  const float shift = ce_scale * spec.label_smoothing / spec.classes;
  // u and q are subtracted before they are scaled: equal rows have no gradient, to the bit
  const float scale = kd_scale * scratch.q_factor, of_u = scratch.u_factor / scratch.q_factor;
  const float of_q = needs_q1 ? 0.0f : q1_scale * scratch.q_factor;
  const Rate natural = natural_rate();
  const KdScratch from = scratch;  // no store to dlogits may change them
  const KdStats at = stats;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    const vf q = load_or_zero(from.q + i, n);
    vf dz = scale * (of_u * load_or_zero(from.u + i, n) - q * at.u_sum) + of_q * q;
    if (needs_q1)
      dz += q1_scale * vexp_below(load_n(student + i, n) - at.max_s - at.logd_1, natural);
    store_n(dlogits + i, n, dz - shift);
  });
  if (has_ce && label < V) dlogits[label] -= ce_scale * (1.0f - spec.label_smoothing);
}

#include "kd_loss_stages_rows.h"
#include "kd_loss_whole_rows.h"
#include "kd_loss_logit_rows.h"
#include "topk_kd_loss_rows.h"

template <Divergence kDivergence>
constexpr KdRowKernels kernels_of_one() {
  if constexpr (is_of_row(kDivergence)) {
    return {kIsaName,
            {of_row_fwd<kDivergence, false>, of_row_fwd<kDivergence, true>},
            of_row_recompute<kDivergence>,
            row_grad,
            {row_part<kDivergence, false>, row_part<kDivergence, true>},
            of_row_part_sums<kDivergence>,
            topk_row_fwd<kDivergence>,
            topk_row_grad};
  } else if constexpr (is_of_logits(kDivergence)) {
    return {kIsaName,
            {of_logits_fwd<kDivergence, false>, of_logits_fwd<kDivergence, true>},
            of_logits_recompute<kDivergence>,
            row_grad,
            {row_part<kDivergence, false>, row_part<kDivergence, true>},
            of_logits_part_sums<kDivergence>,
            nullptr,  // Python refuses these beside a list of classes
            nullptr};
  } else {
    return {kIsaName,
            {row_fwd<kDivergence, false>, row_fwd<kDivergence, true>},
            row_recompute<kDivergence>,
            row_grad,
            {row_part<kDivergence, false>, row_part<kDivergence, true>},
            row_sums<kDivergence>,
            topk_row_fwd<kDivergence>,
            topk_row_grad};
  }
}

template <int64_t... kIds>
constexpr std::array<KdRowKernels, sizeof...(kIds)> kernels_of(
    std::integer_sequence<int64_t, kIds...>) {
  return {kernels_of_one<static_cast<Divergence>(kIds)>()...};
}

// By divergence, and behind the last those of a weighted sum.
constexpr auto kKernels = kernels_of(std::make_integer_sequence<int64_t, kNumDivergences + 1>{});
