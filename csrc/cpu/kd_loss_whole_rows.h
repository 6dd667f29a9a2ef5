// Row kernels of divergences that are functions of sums over the row, and of weighted sums of
// several divergences. Included by kd_loss_rows.h, once per instruction set. Formulas in
// kernels/divergences.py.

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

template <Divergence kDivergence>
KdSums of_row_terms(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                    const KdStats& stats, const Softmaxes& softmax, const KdScratch& scratch) {
  const float inv_d_s = static_cast<float>(1.0 / softmax.d_s);
  const float inv_d_t = static_cast<float>(1.0 / softmax.d_t);
  const float logd_gap = static_cast<float>(softmax.logd_gap);
  const auto at = [&](int64_t i, int n) __attribute__((always_inline)) {
    return class_at(student, teacher, i, n, spec, stats, logd_gap,
                    load_or_zero(scratch.q + i, n) * inv_d_s,
                    load_or_zero(scratch.u + i, n) * inv_d_t);
  };
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
  double sum = 0, excess = 0, second_order = 0, variation = 0, kl = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sums[5] = {};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Class x = at(i, n);
      sums[3] += 0.5f * vabs(gap_of(x));
      if constexpr (kDivergence == Divergence::kLkHybrid) {
        sums[4] += select(x.p == 0.0f, vf{}, x.p * x.d);
      } else {
        const vf log = log_addend<kDivergence>(x, spec);
        sums[0] += vexp(log - base);
        if constexpr (kDivergence == Divergence::kRenyi) {
          const vf more = renyi_excess(x, log, spec);
          sums[1] += more;
          sums[2] += more - spec.c0 * gap_of(x);
        }
      }
    });
    sum += reduce_sum(sums[0]);
    excess += reduce_sum(sums[1]);
    second_order += reduce_sum(sums[2]);
    variation += reduce_sum(sums[3]);
    kl += reduce_sum(sums[4]);
  }
  const double log_s = base + __builtin_log(sum);
  double kd = 0, inv_s = 1.0 / (1.0 - variation);
  bool is_near = false;
  float blend = 0.0f;
  if constexpr (kDivergence == Divergence::kRenyi) {
    is_near = __builtin_fabs(log_s) < 0.5;
    kd = (is_near ? __builtin_log1p(second_order) : log_s) * static_cast<double>(spec.c1);
    if (top == __builtin_inff()) kd = __builtin_inf();
    inv_s = 1.0 / (1.0 + excess);
  } else if constexpr (kDivergence == Divergence::kNegativeLogAcceptance) {
    is_near = variation < 0.5;
    kd = is_near ? -__builtin_log1p(-variation) : -log_s;
  } else {
    blend = static_cast<float>(__builtin_exp(-spec.c0 * (1.0 - variation)));
    kd = (kl > 0.0 ? blend * kl : 0.0) + (1.0f - blend) * variation;
  }
  const double nan = variation - variation;  // or 0: a NaN is no class that has less than another
  kd += nan;
  const float log_total = static_cast<float>(log_s + nan), slope = static_cast<float>(inv_s);
  double u_sum = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum_u{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Class x = at(i, n);
      vf u;
      if constexpr (kDivergence == Divergence::kLkHybrid) {
        const vf gap = -gap_of(x);
        u = blend * gap + (1.0f - blend) * 0.5f * x.q * sign_of(gap);
      } else if constexpr (kDivergence == Divergence::kRenyi) {
        const vf log = log_addend<kDivergence>(x, spec);
        u = is_near ? -slope * renyi_excess(x, log, spec) : -vexp(log - log_total);
      } else if (is_near) {
        u = 0.5f * slope * x.q * sign_of(-gap_of(x));
      } else {
        const vf part = vexp(log_addend<kDivergence>(x, spec) - log_total);
        const vf at_tie = select(x.d == 0.0f, splat(0.5f), vf{});
        u = -part * select(x.d > 0.0f, splat(1.0f), at_tie);
      }
      sum_u += u;
      store_n(scratch.u + i, n, u);
    });
    u_sum += reduce_sum(sum_u);
  }
  return {kd < 0.0 ? 0.0 : kd, u_sum};
}

template <Divergence kDivergence, bool kMore>
KdLosses of_row_fwd(const float* student, const float* teacher, int64_t V, int64_t label,
                    const KdSpec& spec, KdStats& stats, KdScratch& scratch, KdExtras* extras) {
  const Softmaxes softmax =
      softmaxes<false, kMore>(student, teacher, V, label, spec, stats, scratch, extras);
  const KdSums sums = of_row_terms<kDivergence>(student, teacher, V, spec, stats, softmax, scratch);
  stats.u_sum = static_cast<float>(sums.u);
  scratch.q_factor = static_cast<float>(1.0 / softmax.d_s);
  scratch.u_factor = 1.0f;
  return {static_cast<float>(sums.kd), softmax.ce};
}

// The sums again: what they become is not in the statistics.
template <Divergence kDivergence>
void of_row_recompute(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                      const KdStats&, KdScratch& scratch) {
  KdStats again;
  of_row_fwd<kDivergence, false>(student, teacher, V, -1, spec, again, scratch, nullptr);
}

// --- weighted sums

using RowTerms = KdSums (*)(const float*, const float*, int64_t, const KdSpec&, const KdStats&,
                            const Softmaxes&, const float*, const float*, float*);

template <int64_t... kIds>
constexpr std::array<RowTerms, sizeof...(kIds)> terms_of(std::integer_sequence<int64_t, kIds...>) {
  return {row_terms<static_cast<Divergence>(kIds)>...};
}

// Those that are sums over the classes.
constexpr auto kTerms = terms_of(std::make_integer_sequence<int64_t, kNumSums>{});

// One softmax of either side, and pass 3 of each part while the row is in cache.
template <bool kMore>
KdLosses sum_fwd(const float* student, const float* teacher, int64_t V, int64_t label,
                 const KdSpec& spec, KdStats& stats, KdScratch& scratch, KdExtras* extras) {
  const Softmaxes softmax =
      softmaxes<false, kMore>(student, teacher, V, label, spec, stats, scratch, extras);
  const float q_factor = static_cast<float>(1.0 / softmax.d_s);
  float *of_part = scratch.more, *total = scratch.more + V;
  double kd = 0, u_sum = 0;
  for (int64_t k = 0; k < spec.num_parts; ++k) {
    const KdSummand& part = spec.parts[k];
    KdSpec of_one = spec;
    of_one.c0 = part.c0, of_one.c1 = part.c1, of_one.c2 = part.c2, of_one.c3 = part.c3;
    const KdSums sums = kTerms[static_cast<int64_t>(part.divergence)](
        student, teacher, V, of_one, stats, softmax, scratch.q, scratch.u, of_part);
    // u = q - p in the place of -p: equal rows have no gradient, to the bit
    const float shift = part.divergence == Divergence::kForwardKl ? 1.0f : 0.0f;
    kd += part.weight * sums.kd;
    u_sum += part.weight * (sums.u + shift);
    const float of_q = shift * q_factor;
    for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf before = k == 0 ? vf{} : load_or_zero(total + i, n);
      const vf u = load_or_zero(of_part + i, n) + of_q * load_or_zero(scratch.q + i, n);
      store_n(total + i, n, before + part.weight * u);
    });
  }
  __builtin_memcpy(scratch.u, total, V * sizeof(float));
  stats.u_sum = static_cast<float>(u_sum);
  scratch.q_factor = q_factor;
  scratch.u_factor = 1.0f;
  return {static_cast<float>(kd), softmax.ce};
}

inline void sum_recompute(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                          const KdStats&, KdScratch& scratch) {
  KdStats again;
  sum_fwd<false>(student, teacher, V, -1, spec, again, scratch, nullptr);
}

constexpr KdRowKernels kSumKernels = {
    kIsaName, {sum_fwd<false>, sum_fwd<true>}, sum_recompute, row_grad, {}, nullptr, nullptr,
    nullptr};
