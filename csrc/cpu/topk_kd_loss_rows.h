// The row kernels of a teacher that lists a few classes; formulas in kernels/kd_loss/topk.py.
// Included by kd_loss_rows.h, once per instruction set.
//
//   forward     1. the others' maximum   2. their e^x and its sum   3. the list, one class after
//               another in double   4. of "renormalise", f and u of the others
//   gradient    dlogits of the others from e^x, then those of the list
//
// "The others" are the classes that are not listed: their e^x are relative to their own maximum,
// so that their share of the row is as exact where a student gives them next to nothing.

template <Divergence kDivergence>
KdLosses topk_row_fwd(const float* student, int64_t V, const TopKRow& teacher, int64_t label,
                      const KdSpec& spec, TopKStats& stats, const TopKScratch& scratch,
                      float* lse) {
  constexpr float kInf = __builtin_inff();
  const int64_t K = teacher.count;
  __builtin_memcpy(scratch.e, student, V * sizeof(float));
  for (int64_t k = 0; k < K; ++k) {
    scratch.z[k] = student[teacher.ids[k]];
    scratch.e[teacher.ids[k]] = -kInf;
  }
  vf max_others = splat(-kInf);
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    max_others = vmax(load_n(scratch.e + i, n), max_others);
  });
  const float max_o = reduce_max(max_others);
  const bool is_empty = max_o == -kInf;  // or holds NaN, which the sum keeps
  const float base = is_empty ? 0.0f : max_o;
  float max_all = max_o;
  for (int64_t k = 0; k < K; ++k) max_all = scratch.z[k] > max_all ? scratch.z[k] : max_all;

  const bool has_ce = label >= 0 && spec.ce_weight != 0.0f;
  const bool smooths = has_ce && spec.label_smoothing != 0.0f;
  const bool has_z = spec.z_loss_weight != 0.0f || lse != nullptr;
  const bool needs_d1 = (has_ce || has_z) && spec.inv_temperature != 1.0f;
  const Rate rate = rate_of(spec.rate), natural = natural_rate();
  double d_o = 0, d_o1 = 0, x_sum = 0;  // x_sum: of the list's too
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum{}, sum_1{}, sum_x{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf x = load_n(scratch.e + i, n) - base;
      const vf e = vexp_below(x, rate);
      sum += e;
      if (needs_d1) sum_1 += vexp_below(x, natural);
      if (smooths) {
        sum_x += (n == kLanes ? load(student + i) : load_tail(student + i, n, base)) - base;
      }
      store_n(scratch.e + i, n, e);
    });
    d_o += reduce_sum(sum);
    d_o1 += reduce_sum(sum_1);
    x_sum += reduce_sum(sum_x);
  }

  // of the whole row: d = sum e^((z - max_all) / temperature)
  const double inv_t = spec.inv_temperature;
  const double below = is_empty ? 0.0 : static_cast<double>(base) - max_all;
  double d_all = d_o * __builtin_exp(below * inv_t), d_1 = d_o1 * __builtin_exp(below);
  for (int64_t k = 0; k < K; ++k) {
    const double x = static_cast<double>(scratch.z[k]) - max_all;
    d_all += __builtin_exp(x * inv_t);
    if (needs_d1) d_1 += __builtin_exp(x);
  }
  const double logd = __builtin_log(d_all), logd_1 = needs_d1 ? __builtin_log(d_1) : logd;

  const auto put = [&](int64_t k, double log_p, double log_q) {
    scratch.p[k] = static_cast<float>(__builtin_exp(log_p));
    scratch.q[k] = static_cast<float>(__builtin_exp(log_q));
    scratch.d[k] = static_cast<float>(log_p - log_q);
    scratch.log_p[k] = static_cast<float>(log_p);
    scratch.log_q[k] = static_cast<float>(log_q);
  };
  for (int64_t k = 0; k < K; ++k) {
    put(k, teacher.log_p[k], (static_cast<double>(scratch.z[k]) - max_all) * inv_t - logd);
  }
  int64_t count = K;
  if (teacher.tail == TopKTail::kBucket) {
    const double log_q = is_empty ? __builtin_log(d_o) : below * inv_t + __builtin_log(d_o) - logd;
    // nothing of the student's is left, and of the teacher's no more than rounding
    const bool is_gone = d_o == 0 && is_empty && (K == V || teacher.log_tail < kLogRounding);
    put(count++, is_gone ? -kInf : teacher.log_tail, log_q);
  }
  const auto at = [&](int64_t i, int n) __attribute__((always_inline)) -> Class {
    return {load_or_zero(scratch.q + i, n), load_or_zero(scratch.p + i, n),
            load_or_zero(scratch.d + i, n), load_n(scratch.log_q + i, n),
            load_n(scratch.log_p + i, n)};
  };
  double f_sum = 0, u_sum = 0;
  if constexpr (is_of_row(kDivergence)) {
    KdOfRow of_row;
    const KdSums<double> sums =
        of_sums<kDivergence>(of_row_sums<kDivergence, true>(count, spec, at), spec, of_row);
    f_sum = sums.kd, u_sum = sums.u;
    for_each_vector(0, count, [&](int64_t i, int n) __attribute__((always_inline)) {
      store_n(scratch.u_list + i, n, of_row_u<kDivergence>(at(i, n), of_row, spec));
    });
  } else {
    for_each_vector(0, count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Class x = at(i, n);
      const Terms terms = class_terms<kDivergence>(x, spec);
      const vf u = terms.u + teacher.missing * x.q;
      f_sum += reduce_sum(terms.f);
      u_sum += reduce_sum(u);
      store_n(scratch.u_list + i, n, u);
    });
  }

  // q of the others is e^x times this
  const float share = static_cast<float>(__builtin_exp(below * inv_t - logd));
  if constexpr (!is_of_row(kDivergence)) {  // whose others are in a bucket
    if (teacher.tail == TopKTail::kRenormalise) {
      for (int64_t block = 0; block < V; block += kBlock) {
        const int64_t end = block + kBlock < V ? block + kBlock : V;
        vf sum_f{}, sum_u{};
        for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
          const vf q = load_or_zero(scratch.e + i, n) * share;
          const vf none = splat(-kInf);
          const float log_d = static_cast<float>(logd);
          const vf x = (load_n(student + i, n) - max_all) * spec.inv_temperature - log_d;
          const vf log_q = select(q == 0.0f, none, x);  // that of the list too
          const Terms terms = class_terms<kDivergence>(Class{q, vf{}, none, log_q, none}, spec);
          sum_f += terms.f;
          sum_u += terms.u;
          store_n(scratch.u + i, n, terms.u);
        });
        f_sum += reduce_sum(sum_f);
        u_sum += reduce_sum(sum_u);
      }
    }
  }
  const bool is_whole = kDivergence == Divergence::kForwardKl && teacher.tail != TopKTail::kNone;
  stats.u_sum = is_whole ? -1.0f : static_cast<float>(u_sum);
  stats.max = max_all;
  stats.logd_1 = static_cast<float>(logd_1);
  stats.share = share;
  // dD/dz of the others is e^x times this, and u of theirs where they have one
  stats.of_others = -stats.u_sum * share;
  if (teacher.tail == TopKTail::kBucket && d_o > 0) {
    stats.of_others += static_cast<float>(scratch.u_list[K] / d_o);
  }
  double ce = 0;
  if (has_ce) ce = logd_1 - (static_cast<double>(student[label]) - max_all);
  if (smooths) {
    const double mean = logd_1 - (x_sum / static_cast<double>(V) + (base - max_all));
    ce += spec.label_smoothing * (mean - ce);
  }
  if (lse != nullptr) *lse = static_cast<float>(max_all + logd_1);
  return {static_cast<float>(f_sum), static_cast<float>(ce)};
}

void topk_row_grad(const float* student, int64_t V, const TopKRow& teacher, int64_t label,
                   float row_weight, const KdSpec& spec, const TopKStats& stats,
                   const TopKScratch& scratch, float* dlogits) {
  const bool has_ce = label >= 0 && spec.ce_weight != 0.0f;
  const bool has_z = spec.z_loss_weight != 0.0f;
  const bool needs_q1 = (has_ce || has_z) && spec.inv_temperature != 1.0f;
  const bool has_u = teacher.tail == TopKTail::kRenormalise;
  const float kd_scale = row_weight * spec.kd_weight * spec.inv_temperature;
  const float ce_scale = has_ce ? row_weight * spec.ce_weight : 0.0f;
  float q1_scale = ce_scale;
  if (has_z) q1_scale += 2.0f * row_weight * spec.z_loss_weight * (stats.max + stats.logd_1);
  const float shift = ce_scale * spec.label_smoothing / spec.classes;
  const float of_e = kd_scale * stats.of_others + (needs_q1 ? 0.0f : q1_scale * stats.share);
  const Rate natural = natural_rate();
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    vf dz = load_or_zero(scratch.e + i, n) * of_e;
    if (has_u) dz += kd_scale * load_or_zero(scratch.u + i, n);
    if (needs_q1)
      dz += q1_scale * vexp_below(load_n(student + i, n) - stats.max - stats.logd_1, natural);
    store_n(dlogits + i, n, dz - shift);
  });
  for (int64_t k = 0; k < teacher.count; ++k) {
    float dz = kd_scale * (scratch.u_list[k] - scratch.q[k] * stats.u_sum);
    if (has_ce || has_z) {
      const float x = scratch.z[k] - stats.max;
      dz += q1_scale * (needs_q1 ? __builtin_expf(x - stats.logd_1) : scratch.q[k]);
    }
    dlogits[teacher.ids[k]] = dz - shift;
  }
  if (has_ce) dlogits[label] -= ce_scale * (1.0f - spec.label_smoothing);
}
