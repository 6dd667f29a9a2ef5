// What a class adds to a divergence that is a function of sums over the row, and what follows from
// those: for vectors of a CPU and scalars of a GPU alike.
//
// Included inside a namespace, after kd_loss_terms.h, that has log_of, log1p_of and exp_of of one
// number; no include guard and no includes of its own. Formulas in kernels/divergences.py.

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

// Sums over classes, in the order of KdRowSums. S, and `first` of an acceptance, are relative to
// the largest addend.
struct OfRowTerms {
  vf s;
  vf first;
  vf second;
  vf variation;
  vf signed_sum;
};

// Adds a class. base: the largest logarithm of an addend, or what is finite in its place. kU: also
// what the sum of u follows from, where it is not summed itself.
template <Divergence kDivergence, bool kU>
MODXFER_INLINE void add_of_row(const Class& x, float base, const KdSpec& spec, OfRowTerms& sums) {
  const vf gap = gap_of(x);
  sums.variation += 0.5f * vabs(gap);
  if constexpr (kU && kDivergence != Divergence::kRenyi) {
    sums.signed_sum += 0.5f * x.q * sign_of(-gap);
  }
  if constexpr (kDivergence == Divergence::kLkHybrid) {
    sums.first += select(x.p == 0.0f, vf{}, x.p * x.d);
  } else {
    const vf log = log_addend<kDivergence>(x, spec);
    const vf part = vexp(log - base);
    sums.s += part;
    if constexpr (kDivergence == Divergence::kRenyi) {
      const vf more = renyi_excess(x, log, spec);
      sums.first += more;
      sums.second += more - spec.c0 * gap;
    } else if constexpr (kU) {
      sums.first += part * less_of(x);
    }
  }
}

MODXFER_INLINE float base_of(float top) { return top > -__builtin_inff() ? top : 0.0f; }

// Sums whose log_sum is S, and `first` of an acceptance, relative to `base_of(top)`: their
// logarithms.
template <Divergence kDivergence, class Number>
MODXFER_INLINE void take_logarithms(float top, KdRowSums<Number>& sums) {
  if constexpr (kDivergence != Divergence::kLkHybrid) {
    const float base = base_of(top);
    sums.log_sum = top == __builtin_inff() ? top : base + log_of(sums.log_sum);
    sums.log_sum += sums.variation - sums.variation;  // a NaN is less than no other class
    if constexpr (kDivergence == Divergence::kNegativeLogAcceptance) {
      sums.first = base + log_of(sums.first);
    }
  }
}

// The divergence, the sum of u, and what u of a class is made of.
template <Divergence kDivergence, class Number>
MODXFER_INLINE KdSums<Number> of_sums(const KdRowSums<Number>& sums, const KdSpec& spec,
                                      KdOfRow& of_row) {
  const Number one = 1, half = 0.5f, inf = __builtin_inff();
  Number kd, u;
  if constexpr (kDivergence == Divergence::kLkHybrid) {
    const Number blend = exp_of(-spec.c0 * (one - sums.variation));
    of_row = {static_cast<float>(blend), 0.0f};
    kd = (sums.first > 0 ? blend * sums.first : 0) + (one - blend) * sums.variation;
    u = (one - blend) * sums.signed_sum;
  } else {
    // of sides that share no class, whose divergence is infinite
    const Number log_s = sums.log_sum == -inf ? 0 : sums.log_sum;
    bool is_near;
    Number slope;
    if constexpr (kDivergence == Divergence::kRenyi) {
      is_near = -half < sums.log_sum && sums.log_sum < half;
      slope = one / (one + sums.first);
      kd = (is_near ? log1p_of(sums.second) : sums.log_sum) * spec.c1;
      u = is_near ? -slope * sums.first : -exp_of(sums.log_sum - log_s);
    } else {
      is_near = sums.variation < half;
      slope = one / (one - sums.variation);
      kd = -(is_near ? log1p_of(-sums.variation) : sums.log_sum);
      u = is_near ? slope * sums.signed_sum : -exp_of(sums.first - log_s);
    }
    of_row = {is_near ? static_cast<float>(slope) : 0.0f, static_cast<float>(log_s)};
  }
  kd += sums.variation - sums.variation;
  return {kd < 0 ? 0 : kd, u};
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
