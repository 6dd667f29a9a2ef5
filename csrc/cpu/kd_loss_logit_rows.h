// Row kernels of the divergences of the logits themselves. Included by kd_loss_rows.h, once per
// instruction set.

#include "modxfer/kd_loss_of_logits.h"

// Of length 1.
inline LogitScale unit_row(const float* row, int64_t V) {
  vf most = splat(kLeastSize);
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    most = vmax(vabs(without_excluded(load_n(row + i, n))), most);
  });
  const float near = near_of(reduce_max(most));
  double squared = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf z = without_excluded(load_n(row + i, n)) * near;
      sum += z * z;
    });
    squared += reduce_sum(sum);
  }
  return unit_scale(near, squared);
}

// What the rows are compared by.
template <Divergence kDivergence>
void scale_rows(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                LogitScale& of_s, LogitScale& of_t) {
  of_s = of_t = {1.0f, spec.inv_temperature};
  if constexpr (kDivergence == Divergence::kLogitsCosine) {
    of_s = unit_row(student, V), of_t = unit_row(teacher, V);
  }
}

// The sum of squared gaps, each of which goes to put(i, n, gap).
template <class Put>
double gap_squares(const float* student, const float* teacher, int64_t V, const LogitScale& of_s,
                   const LogitScale& of_t, const Put& put) {
  double squares = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf gap = logit_gap(load_n(student + i, n), load_n(teacher + i, n), of_s, of_t).gap;
      sum += gap * gap;
      put(i, n, gap);
    });
    squares += reduce_sum(sum);
  }
  return squares;
}

template <Divergence kDivergence, bool kMore>
KdLosses of_logits_fwd(const float* student, const float* teacher, int64_t V, int64_t label,
                       const KdSpec& spec, KdStats& stats, KdScratch& scratch, KdExtras* extras) {
  const Softmaxes softmax =
      softmaxes<false, kMore>(student, teacher, V, label, spec, stats, scratch, extras);
  LogitScale of_s, of_t;
  scale_rows<kDivergence>(student, teacher, V, spec, of_s, of_t);
  const double squares = gap_squares(student, teacher, V, of_s, of_t,
                                     [&](int64_t i, int n, vf gap) __attribute__((always_inline)) {
                                       store_n(scratch.u + i, n, gap);
                                     });
  const OfLogits<double> row =
      of_squares<kDivergence>(squares, static_cast<double>(V), of_s, of_t, spec.inv_temperature);
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    const vf x = without_excluded(load_n(student + i, n)) * of_s.near;
    store_n(scratch.u + i, n, row.factor * (load_or_zero(scratch.u + i, n) - row.back * x));
  });
  // there is no softmax for a sum of u to go through; NaN of a row with NaN, +inf or no class
  stats.u_sum = 0.0f * (stats.logd_s + stats.logd_t);
  scratch.q_factor = static_cast<float>(1.0 / softmax.d_s);
  scratch.u_factor = 1.0f;
  return {static_cast<float>(row.kd) + stats.u_sum, softmax.ce};
}

// The scales again where nobody tells their numbers, which are not in the statistics.
template <Divergence kDivergence>
void of_logits_recompute(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                         const KdStats& stats, const float* numbers, KdScratch& scratch) {
  if (numbers == nullptr) {
    KdStats again;
    of_logits_fwd<kDivergence, false>(student, teacher, V, -1, spec, again, scratch, nullptr);
    return;
  }
  LogitScale of_s, of_t;
  const OfLogits<float> row = of_numbers<kDivergence>(numbers, spec.inv_temperature, of_s, of_t);
  scratch.q_factor = scratch.u_factor = 1.0f;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    const LogitGap of = logit_gap(load_n(student + i, n), load_n(teacher + i, n), of_s, of_t);
    store_n(scratch.q + i, n, class_of(student, teacher, i, n, spec, stats).q);
    store_n(scratch.u + i, n, row.factor * (of.gap - row.back * of.x));
  });
}

// Of a part of the classes, in stages.
template <Divergence kDivergence>
void of_logits_part_sums(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                         const KdStats&, double* sums) {
  LogitScale of_s, of_t;
  scale_rows<kDivergence>(student, teacher, V, spec, of_s, of_t);
  const double squares = gap_squares(student, teacher, V, of_s, of_t, [](int64_t, int, vf) {});
  put_logit_sums<kDivergence>(squares, static_cast<double>(V), of_s, of_t, spec.inv_temperature,
                              sums);
}
