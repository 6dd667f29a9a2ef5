// Row kernels of divergences that are functions of sums over the row. Included by kd_loss_rows.h,
// once per instruction set. Formulas in kernels/divergences.py.

constexpr bool is_of_row(Divergence divergence) {
  return divergence >= Divergence::kRenyi && divergence <= Divergence::kLkHybrid;
}

// e^x - 1 for |x| <= 1/2, exactly 0 at 0.
MODXFER_INLINE vf vexpm1_small(vf x) {
  vf y = splat(1.0f);
  for (int n = 9; n > 1; --n) y = y * x * (1.0f / static_cast<float>(n)) + 1.0f;
  return x * y;
}

MODXFER_INLINE vf sign_of(vf gap) {
  return select(gap > 0.0f, splat(1.0f), select(gap < 0.0f, splat(-1.0f), gap));
}

// 1 where the student has less than the teacher, 1/2 where it has as much.
MODXFER_INLINE vf less_of(const Class& x) {
  return select(x.d > 0.0f, splat(1.0f), select(x.d == 0.0f, splat(0.5f), vf{}));
}

// p - q, 0 where both are equal however they were rounded.
MODXFER_INLINE vf gap_of(const Class& x) { return select(x.d == 0.0f, vf{}, x.p - x.q); }

// The logarithm of the class's addend of S: p^alpha q^(1 - alpha), or min(p, q).
template <Divergence kDivergence>
MODXFER_INLINE vf log_addend(const Class& x, const KdSpec& spec) {
  if constexpr (kDivergence == Divergence::kRenyi) {
    const vf inf = splat(__builtin_inff());
    const vf of_p = spec.c0 > 1.0f ? inf : -inf;  // of a class that the student alone excludes
    const vf absent = select(x.log_p == -inf, -inf, of_p);
    return select(x.log_q == -inf, absent, x.log_q + spec.c0 * x.d);
  } else {
    return vmin(x.log_p, x.log_q);
  }
}

// The addend less q, exactly 0 where d is; finite where the addend is.
MODXFER_INLINE vf renyi_excess(const Class& x, vf log, const KdSpec& spec) {
  const vf power = spec.c0 * x.d;
  return select(vabs(power) < 0.5f, x.q * vexpm1_small(power), vexp(log) - x.q);
}

// The sums over V classes, which `at` gives by vectors, be they a list or some of a row; kU: also
// what the sum of u follows from, where it is not summed itself.
template <Divergence kDivergence, bool kU, class At>
KdRowSums of_row_sums(int64_t V, const KdSpec& spec, const At& at) {
  // S is summed relative to its largest addend
  float top = 0.0f;
  if constexpr (kDivergence != Divergence::kLkHybrid) {
    vf most = splat(-__builtin_inff());
    for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
      most = vmax(log_addend<kDivergence>(at(i, n), spec), most);
    });
    top = reduce_max(most);
  }
  const float base = top > -__builtin_inff() ? top : 0.0f;
  double sum = 0;
  KdRowSums sums{};
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf of_s{}, first{}, second{}, variation{}, signed_sum{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Class x = at(i, n);
      const vf gap = gap_of(x);
      variation += 0.5f * vabs(gap);
      if constexpr (kU && kDivergence != Divergence::kRenyi) {
        signed_sum += 0.5f * x.q * sign_of(-gap);
      }
      if constexpr (kDivergence == Divergence::kLkHybrid) {
        first += select(x.p == 0.0f, vf{}, x.p * x.d);
      } else {
        const vf log = log_addend<kDivergence>(x, spec);
        const vf part = vexp(log - base);
        of_s += part;
        if constexpr (kDivergence == Divergence::kRenyi) {
          const vf more = renyi_excess(x, log, spec);
          first += more;
          second += more - spec.c0 * gap;
        } else if constexpr (kU) {
          first += part * less_of(x);
        }
      }
    });
    sum += reduce_sum(of_s);
    sums.first += reduce_sum(first);
    sums.second += reduce_sum(second);
    sums.variation += reduce_sum(variation);
    sums.signed_sum += reduce_sum(signed_sum);
  }
  if constexpr (kDivergence == Divergence::kLkHybrid) return sums;
  sums.log_sum = top == __builtin_inff() ? __builtin_inf() : base + __builtin_log(sum);
  sums.log_sum += sums.variation - sums.variation;  // a NaN is no class that is less than another
  if constexpr (kDivergence == Divergence::kNegativeLogAcceptance) {
    sums.first = base + __builtin_log(sums.first);
  }
  return sums;
}

// The divergence, the sum of u, and what u of a class is made of.
template <Divergence kDivergence>
KdSums of_sums(const KdRowSums& sums, const KdSpec& spec, KdOfRow& of_row) {
  double kd, u;
  if constexpr (kDivergence == Divergence::kLkHybrid) {
    const double blend = __builtin_exp(-spec.c0 * (1.0 - sums.variation));
    of_row = {static_cast<float>(blend), 0.0f};
    kd = (sums.first > 0.0 ? blend * sums.first : 0.0) + (1.0 - blend) * sums.variation;
    u = (1.0 - blend) * sums.signed_sum;
  } else {
    // of sides that share no class, whose divergence is infinite
    const double log_s = sums.log_sum == -__builtin_inf() ? 0.0 : sums.log_sum;
    bool is_near;
    double slope;
    if constexpr (kDivergence == Divergence::kRenyi) {
      is_near = __builtin_fabs(sums.log_sum) < 0.5;
      slope = 1.0 / (1.0 + sums.first);
      kd = (is_near ? __builtin_log1p(sums.second) : sums.log_sum) * static_cast<double>(spec.c1);
      u = is_near ? -slope * sums.first : -__builtin_exp(sums.log_sum - log_s);
    } else {
      is_near = sums.variation < 0.5;
      slope = 1.0 / (1.0 - sums.variation);
      kd = -(is_near ? __builtin_log1p(-sums.variation) : sums.log_sum);
      u = is_near ? slope * sums.signed_sum : -__builtin_exp(sums.first - log_s);
    }
    of_row = {is_near ? static_cast<float>(slope) : 0.0f, static_cast<float>(log_s)};
  }
  kd += sums.variation - sums.variation;
  return {kd < 0.0 ? 0.0 : kd, u};
}

template <Divergence kDivergence>
MODXFER_INLINE vf of_row_u(const Class& x, const KdOfRow& of_row, const KdSpec& spec) {
  const float slope = of_row.slope;
  if constexpr (kDivergence == Divergence::kLkHybrid) {
    const vf gap = -gap_of(x);
    return slope * gap + (1.0f - slope) * 0.5f * x.q * sign_of(gap);
  } else if constexpr (kDivergence == Divergence::kRenyi) {
    const vf log = log_addend<kDivergence>(x, spec);
    return slope != 0.0f ? -slope * renyi_excess(x, log, spec) : -vexp(log - of_row.log_sum);
  } else {
    if (slope != 0.0f) return 0.5f * slope * x.q * sign_of(-gap_of(x));
    return -vexp(log_addend<kDivergence>(x, spec) - of_row.log_sum) * less_of(x);
  }
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
  const KdSums sums =
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
                      const KdStats& stats, const KdOfRow* of_row, KdScratch& scratch) {
  if (of_row == nullptr) {
    KdStats again;
    of_row_fwd<kDivergence, false>(student, teacher, V, -1, spec, again, scratch, nullptr);
    return;
  }
  scratch.q_factor = scratch.u_factor = 1.0f;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    const Class x = class_of(student, teacher, i, n, spec, stats);
    store_n(scratch.q + i, n, x.q);
    store_n(scratch.u + i, n, of_row_u<kDivergence>(x, *of_row, spec));
  });
}

// Of a part of the classes, in stages.
template <Divergence kDivergence>
void of_row_part_sums(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                      const KdStats& stats, double* sums) {
  const auto at = [&](int64_t i, int n) __attribute__((always_inline)) {
    return class_of(student, teacher, i, n, spec, stats);
  };
  *reinterpret_cast<KdRowSums*>(sums) = of_row_sums<kDivergence, true>(V, spec, at);
}
