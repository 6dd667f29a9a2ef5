// What a class adds to a divergence that is a sum over the classes: one branch each, for vectors of
// a CPU and scalars of a GPU alike.
//
// Included inside a namespace that has vf, vi and the functions of modxfer/vec.h, after
// modxfer/kd_loss.h; no include guard and no includes of its own. Formulas in
// kernels/divergences.py.

struct Terms {
  vf f;  // addend of the divergence
  vf u;  // q dD/dq, up to a multiple of q
};

// What the terms of a class are made of; d = log p - log q, not from the rounded logarithms.
struct Class {
  vf q;
  vf p;
  vf d;
  vf log_q;
  vf log_p;
};

// log(m/q) and log(m/p) of the mixture m = c0 p + c1 q, each from its larger addend: one as the
// difference of the other and d would cancel where d is large. Meaningless of a class without p and
// q.
struct LogMixture {
  vf over_q;
  vf over_p;
};

template <class Constants>
MODXFER_INLINE LogMixture log_mixture(const Class& x, const Constants& spec) {
  const vf gap = x.d + (spec.c2 - spec.c3);
  const vf of_p = spec.c0 * x.p, of_q = spec.c1 * x.q;
  // both may have rounded to 0 where p or q has not
  const vf larger = vmax(vmax(of_p, of_q), splat(1.17549435e-38f));
  const vf rest = vlog1p_unit(vmin(of_p, of_q) / larger);
  // a NaN is not less than 0, and stays
  return {vmax(vf{}, gap) + (rest + spec.c3), vmax(vf{}, -gap) + (rest + spec.c2)};
}

// e^x - 1 for x <= 0, exactly 0 at 0; below -1/2 the difference has no digit to lose.
MODXFER_INLINE vf vexpm1(vf x) {
  vf series = splat(1.0f);
  for (int n = 8; n > 1; --n) series = series * x * (1.0f / static_cast<float>(n)) + 1.0f;
  return select(x > -0.5f, x * series, vexp(x) - 1.0f);
}

// spec: a KdSpec, or a part of a weighted sum, which has such constants too.
template <Divergence kDivergence, class Constants>
MODXFER_INLINE Terms divergence_terms(const Class& x, const Constants& spec) {
  // d is meaningless where its probability is 0, whose term is 0 by definition; a NaN is not 0 and
  // stays
  const vf q = x.q, d = x.d;
  vf p = x.p;
  // those that take differences of p and q: equal ones are so to the bit, however they were rounded
  if constexpr (kDivergence >= Divergence::kTotalVariation) p = select(d == 0.0f, q, p);
  if constexpr (kDivergence == Divergence::kForwardKl) {
    return {select(p == 0.0f, vf{}, p * d), -p};
  } else if constexpr (kDivergence == Divergence::kReverseKl) {
    const vf u = select(q == 0.0f, vf{}, -q * d);
    return {u, u};
  } else if constexpr (kDivergence == Divergence::kJsd) {
    const LogMixture log_m = log_mixture(x, spec);
    const vf f_p = select(p == 0.0f, vf{}, -spec.c0 * p * log_m.over_p);
    const vf u = select(q == 0.0f, vf{}, -spec.c1 * q * log_m.over_q);
    return {f_p + u, u};
  } else if constexpr (kDivergence == Divergence::kTotalVariation) {
    const vf gap = q - p;
    const vf sign = select(gap > 0.0f, splat(1.0f), select(gap < 0.0f, splat(-1.0f), gap));
    return {0.5f * vabs(gap), 0.5f * q * sign};
  } else if constexpr (kDivergence == Divergence::kSkewForwardKl) {
    const vf m = spec.c0 * p + spec.c1 * q;
    const vf f = -p * log_mixture(x, spec).over_p;
    const vf u = spec.c1 * spec.c1 * q * ((q - p) / m);
    return {select((p == 0.0f) | (d == 0.0f), vf{}, f), select(m == 0.0f, vf{}, u)};
  } else if constexpr (kDivergence == Divergence::kSkewReverseKl) {
    const vf m = spec.c0 * p + spec.c1 * q;
    const vf f = select((q == 0.0f) | (d == 0.0f), vf{}, -q * log_mixture(x, spec).over_q);
    return {f, f + select(m == 0.0f, vf{}, spec.c0 * spec.c1 * q * ((p - q) / m))};
  } else if constexpr (kDivergence == Divergence::kJeffreys) {
    const vf of_q = select(q == 0.0f, vf{}, -q * d);
    return {select(p == 0.0f, vf{}, p * d) + of_q, (q - p) + of_q};
  } else if constexpr (kDivergence == Divergence::kSquaredHellinger) {
    const vf root_q = vexp(0.5f * x.log_q);
    const vf gap = select(d == 0.0f, vf{}, vexp(0.5f * x.log_p) - root_q);
    return {0.5f * gap * gap, -0.5f * gap * root_q};
  } else if constexpr (kDivergence == Divergence::kChiSquared) {
    const vf gap = p - q;
    // p^2 / q may be finite where p and q are too small to be numbers
    const vf log_squared = x.log_p + d;
    const vf inf = splat(__builtin_inff());
    vf squared = select(log_squared > 88.37626f, inf, vexp(log_squared));
    squared = select(x.log_p == -inf, vf{}, squared);
    const vi near = (vabs(d) < 1.0f) & (q > 0.0f);
    const vf ratio = gap / select(near, q, splat(1.0f));
    return {select(near, gap * ratio, (squared - p) - gap),
            select(near, -ratio * (p + q), q - squared)};
  } else if constexpr (kDivergence == Divergence::kAlphaBeta) {
    // c0 alpha, c1 beta, c2 their sum; from the larger of p and q, whose power is the largest
    const vf top = vexp(spec.c2 * vmax(x.log_p, x.log_q));
    const vf distance = vabs(d);
    const vi of_p = d > 0.0f;
    const vf less = vexpm1(select(of_p, splat(-spec.c1), splat(-spec.c0)) * distance);
    const vf least = vexpm1(-spec.c2 * distance);
    const vf gap_p = select(of_p, -less, least - less);
    const vf gap_q = select(of_p, least - less, -less);
    const vf f = spec.c3 * top * (spec.c0 * gap_p + spec.c1 * gap_q);
    const vf u = spec.c1 * spec.c2 * spec.c3 * top * gap_q;
    return {select(top == 0.0f, vf{}, f), select(top == 0.0f, vf{}, u)};
  } else {
    static_assert(kDivergence == Divergence::kCount, "a divergence without terms");
  }
}
