// Row kernels of the KD loss. Included once per instruction set after vec.h, in the same namespace.
//
// A row pair of V = 128k logits is 1 MB: it comes from memory once and is read again from cache.
//   1. maxima      2. normalisers      3. losses and u_sum      4. dlogits (backward)
// Sums run in float over kBlock elements and in double across blocks: the loss of a close student
// is a small difference of large sums.

constexpr int64_t kBlock = 64 * kLanes;

struct Terms {
  vf f;  // addend of the divergence
  vf u;  // q dD/dq, up to a multiple of q
};

template <Divergence kDivergence>
MODXFER_INLINE Terms divergence_terms(vf q, vf p, vf d, const KdSpec& spec) {
  // d = log p - log q is meaningless where its probability is 0, whose term is 0 by definition
  if constexpr (kDivergence == Divergence::kForwardKl) {
    return {select(p > 0.0f, p * d, vf{}), -p};
  } else if constexpr (kDivergence == Divergence::kReverseKl) {
    const vf u = select(q > 0.0f, -q * d, vf{});
    return {u, u};
  } else {
    const vf log_m_q = vlogaddexp(d + spec.log_beta, splat(spec.log_one_minus_beta));
    // p > 0 = q: log(m/q) and d are infinite, log(p/m) is -log beta
    const vf log_p_m = select(d > 3e38f, splat(-spec.log_beta), d - log_m_q);
    const vf f_p = select(p > 0.0f, spec.beta * p * log_p_m, vf{});
    const vf u = select(q > 0.0f, (spec.beta - 1.0f) * q * log_m_q, vf{});
    return {f_p + u, u};
  }
}

// Calls body(index, count, load) for each vector of [0, V): count < kLanes at the tail, where lanes
// past the row hold -inf, a class without probability.
template <class Body>
MODXFER_INLINE void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, kLanes);
  if (i < end) body(i, static_cast<int>(end - i));
}

MODXFER_INLINE vf load_n(const float* src, int n) {
  return n == kLanes ? load(src) : load_tail(src, n, -__builtin_inff());
}

template <Divergence kDivergence>
KdLosses kd_row_fwd(const float* student, const float* teacher, int64_t V, int64_t label,
                    const KdSpec& spec, KdStats& stats) {
  vf max_s = splat(-__builtin_inff()), max_t = max_s;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    max_s = vmax(load_n(student + i, n), max_s);
    max_t = vmax(load_n(teacher + i, n), max_t);
  });
  stats.max_s = reduce_max(max_s);
  stats.max_t = reduce_max(max_t);

  const bool has_ce = label >= 0 && spec.ce_weight != 0.0f;
  const bool needs_d1 = has_ce && spec.inv_temperature != 1.0f;
  double d_s = 0, d_t = 0, d_1 = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum_s{}, sum_t{}, sum_1{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf x_s = load_n(student + i, n) - stats.max_s;
      const vf x_t = load_n(teacher + i, n) - stats.max_t;
      sum_s += vexp(x_s * spec.inv_temperature);
      sum_t += vexp(x_t * spec.inv_temperature);
      if (needs_d1) sum_1 += vexp(x_s);
    });
    d_s += reduce_sum(sum_s);
    d_t += reduce_sum(sum_t);
    d_1 += reduce_sum(sum_1);
  }
  const double logd_s = __builtin_log(d_s), logd_t = __builtin_log(d_t);
  const double logd_1 = needs_d1 ? __builtin_log(d_1) : logd_s;
  stats.logd_s = static_cast<float>(logd_s);
  stats.logd_t = static_cast<float>(logd_t);
  stats.logd_1 = static_cast<float>(logd_1);

  const float logd_gap = static_cast<float>(logd_t - logd_s);
  double f_sum = 0, u_sum = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum_f{}, sum_u{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf x_s = (load_n(student + i, n) - stats.max_s) * spec.inv_temperature;
      const vf x_t = (load_n(teacher + i, n) - stats.max_t) * spec.inv_temperature;
      const Terms terms = divergence_terms<kDivergence>(
          vexp(x_s - stats.logd_s), vexp(x_t - stats.logd_t), (x_t - x_s) - logd_gap, spec);
      sum_f += terms.f;
      sum_u += terms.u;
    });
    f_sum += reduce_sum(sum_f);
    u_sum += reduce_sum(sum_u);
  }
  stats.u_sum = kDivergence == Divergence::kForwardKl ? -1.0f : static_cast<float>(u_sum);
  const double ce = has_ce ? logd_1 - (static_cast<double>(student[label]) - stats.max_s) : 0.0;
  return {static_cast<float>(f_sum), static_cast<float>(ce)};
}

template <Divergence kDivergence>
void kd_row_bwd(const float* student, const float* teacher, int64_t V, int64_t label,
                float row_weight, const KdSpec& spec, const KdStats& stats, float* dlogits) {
  const bool has_ce = label >= 0 && spec.ce_weight != 0.0f;
  const bool needs_q1 = has_ce && spec.inv_temperature != 1.0f;
  const float kd_scale = row_weight * spec.kd_weight * spec.inv_temperature;
  const float ce_scale = has_ce ? row_weight * spec.ce_weight : 0.0f;
  const float logd_gap = stats.logd_t - stats.logd_s;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    const vf z_s = load_n(student + i, n) - stats.max_s;
    const vf x_s = z_s * spec.inv_temperature;
    const vf x_t = (load_n(teacher + i, n) - stats.max_t) * spec.inv_temperature;
    const vf q = vexp(x_s - stats.logd_s);
    const vf p = vexp(x_t - stats.logd_t);
    const Terms terms = divergence_terms<kDivergence>(q, p, (x_t - x_s) - logd_gap, spec);
    vf dz = kd_scale * (terms.u - q * stats.u_sum);
    dz += ce_scale * (needs_q1 ? vexp(z_s - stats.logd_1) : q);
    if (n == kLanes) {
      store(dlogits + i, dz);
    } else {
      store_tail(dlogits + i, n, dz);
    }
  });
  if (has_ce) dlogits[label] -= ce_scale;
}

KdLosses row_fwd(const float* student, const float* teacher, int64_t V, int64_t label,
                 const KdSpec& spec, KdStats& stats) {
  switch (spec.divergence) {
    case Divergence::kForwardKl:
      return kd_row_fwd<Divergence::kForwardKl>(student, teacher, V, label, spec, stats);
    case Divergence::kReverseKl:
      return kd_row_fwd<Divergence::kReverseKl>(student, teacher, V, label, spec, stats);
    default:
      return kd_row_fwd<Divergence::kJsd>(student, teacher, V, label, spec, stats);
  }
}

void row_bwd(const float* student, const float* teacher, int64_t V, int64_t label, float row_weight,
             const KdSpec& spec, const KdStats& stats, float* dlogits) {
  switch (spec.divergence) {
    case Divergence::kForwardKl:
      return kd_row_bwd<Divergence::kForwardKl>(student, teacher, V, label, row_weight, spec, stats,
                                                dlogits);
    case Divergence::kReverseKl:
      return kd_row_bwd<Divergence::kReverseKl>(student, teacher, V, label, row_weight, spec, stats,
                                                dlogits);
    default:
      return kd_row_bwd<Divergence::kJsd>(student, teacher, V, label, row_weight, spec, stats,
                                          dlogits);
  }
}
