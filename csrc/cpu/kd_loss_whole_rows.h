// Row kernels of divergences that are functions of sums over the row. Included by kd_loss_rows.h,
// once per instruction set. Formulas in kernels/divergences.py.

#include "modxfer/kd_loss_of_row.h"

// The sums over V classes, which `at` gives by vectors, be they a list or some of a row; kU as of
// `add_of_row`.
template <Divergence kDivergence, bool kU, class At>
KdRowSums<double> of_row_sums(int64_t V, const KdSpec& spec, const At& at) {
  // S is summed relative to its largest addend
  float top = 0.0f;
  if constexpr (kDivergence != Divergence::kLkHybrid) {
    vf most = splat(-__builtin_inff());
    for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
      most = vmax(log_addend<kDivergence>(at(i, n), spec), most);
    });
    top = reduce_max(most);
  }
  const float base = base_of(top);
  KdRowSums<double> sums{};
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    OfRowTerms terms{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      add_of_row<kDivergence, kU>(at(i, n), base, spec, terms);
    });
    sums.log_sum += reduce_sum(terms.s);
    sums.first += reduce_sum(terms.first);
    sums.second += reduce_sum(terms.second);
    sums.variation += reduce_sum(terms.variation);
    sums.signed_sum += reduce_sum(terms.signed_sum);
  }
  take_logarithms<kDivergence>(top, sums);
  return sums;
}

template <Divergence kDivergence, bool kMore>
KdLosses of_row_fwd(const float* student, const float* teacher, int64_t V, int64_t label,
                    const KdSpec& spec, KdStats& stats, KdScratch& scratch, KdExtras* extras) {
  const Softmaxes softmax =
      softmaxes<false, kMore>(student, teacher, V, label, spec, stats, scratch, extras);
  const float inv_d_s = static_cast<float>(1.0 / softmax.d_s);
  const float inv_d_t = static_cast<float>(1.0 / softmax.d_t);
  const float logd_gap = static_cast<float>(softmax.logd_gap);
  const auto at = [&](int64_t i, int n) __attribute__((always_inline)) {
    return class_at(student, teacher, i, n, spec, stats, logd_gap,
                    load_or_zero(scratch.q + i, n) * inv_d_s,
                    load_or_zero(scratch.u + i, n) * inv_d_t);
  };
  KdOfRow of_row;
  const KdSums<double> sums =
      of_sums<kDivergence>(of_row_sums<kDivergence, false>(V, spec, at), spec, of_row);
  const KdOfRow own = of_row;  // no store to u may change it
  double u_sum = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum_u{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf u = of_row_u<kDivergence>(at(i, n), own, spec);
      sum_u += u;
      store_n(scratch.u + i, n, u);
    });
    u_sum += reduce_sum(sum_u);
  }
  stats.u_sum = static_cast<float>(u_sum);
  scratch.q_factor = inv_d_s;
  scratch.u_factor = 1.0f;
  return {static_cast<float>(sums.kd), softmax.ce};
}

// The sums again where nobody tells what they become, which is not in the statistics.
template <Divergence kDivergence>
void of_row_recompute(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                      const KdStats& stats, const float* numbers, KdScratch& scratch) {
  if (numbers == nullptr) {
    KdStats again;
    of_row_fwd<kDivergence, false>(student, teacher, V, -1, spec, again, scratch, nullptr);
    return;
  }
  const KdOfRow of_row = {numbers[0], numbers[1]};
  scratch.q_factor = scratch.u_factor = 1.0f;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    const Class x = class_of(student, teacher, i, n, spec, stats);
    store_n(scratch.q + i, n, x.q);
    store_n(scratch.u + i, n, of_row_u<kDivergence>(x, of_row, spec));
  });
}

// Of a part of the classes, in stages.
template <Divergence kDivergence>
void of_row_part_sums(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                      const KdStats& stats, double* sums) {
  const auto at = [&](int64_t i, int n) __attribute__((always_inline)) {
    return class_of(student, teacher, i, n, spec, stats);
  };
  *reinterpret_cast<KdRowSums<double>*>(sums) = of_row_sums<kDivergence, true>(V, spec, at);
}
