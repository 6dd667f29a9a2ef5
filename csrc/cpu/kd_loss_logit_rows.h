// Row kernels of the divergences of the logits themselves, x of the student and y of the teacher.
// Included by kd_loss_rows.h, once per instruction set.
//
//   logits_mse      sum gap^2 / V    gap = x - y            u = 2 / V gap
//   logits_cosine   sum gap^2 / 2    gap = x/|x| - y/|y|    u = (gap - D x/|x|) / |x|
//
// The second is 1 - x y / (|x| |y|), and does not cancel where the rows are near.

constexpr bool is_of_logits(Divergence divergence) {
  return divergence == Divergence::kLogitsMse || divergence == Divergence::kLogitsCosine;
}

// z near far is what a row of logits z is compared by. `near` is a power of 2, by which a product
// is exact: equal rows have a gap of 0, to the bit, contracted to an fma or not.
struct LogitScale {
  float near;
  float far;
};

MODXFER_INLINE vf without_excluded(vf z) { return select(z == -__builtin_inff(), vf{}, z); }

// Of length 1; `far` is 0 of a row of zeros.
inline LogitScale unit_scale(const float* row, int64_t V) {
  vf most = splat(1e-30f);
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    most = vmax(vabs(without_excluded(load_n(row + i, n))), most);
  });
  int exponent;
  __builtin_frexp(vmin(splat(reduce_max(most)), splat(1e30f))[0], &exponent);
  const float near = static_cast<float>(__builtin_ldexp(1.0, -exponent));
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
  return {near, squared == 0.0 ? 0.0f : static_cast<float>(1.0 / __builtin_sqrt(squared))};
}

template <Divergence kDivergence, bool kMore>
KdLosses of_logits_fwd(const float* student, const float* teacher, int64_t V, int64_t label,
                       const KdSpec& spec, KdStats& stats, KdScratch& scratch, KdExtras* extras) {
  constexpr bool kIsCosine = kDivergence == Divergence::kLogitsCosine;
  const Softmaxes softmax =
      softmaxes<false, kMore>(student, teacher, V, label, spec, stats, scratch, extras);
  LogitScale of_s{1.0f, spec.inv_temperature}, of_t = of_s;
  if constexpr (kIsCosine) of_s = unit_scale(student, V), of_t = unit_scale(teacher, V);
  double squares = 0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf z_s = load_n(student + i, n), z_t = load_n(teacher + i, n);
      const vf x = without_excluded(z_s) * of_s.near, y = without_excluded(z_t) * of_t.near;
      const vf gap = of_s.far * (x - y) + (of_s.far - of_t.far) * y;
      const vi is_apart = (z_s == -__builtin_inff()) ^ (z_t == -__builtin_inff());
      const vf kept = select(is_apart, splat(__builtin_inff()), gap);
      sum += kept * kept;
      store_n(scratch.u + i, n, kept);
    });
    squares += reduce_sum(sum);
  }
  double kd = squares / static_cast<double>(V), slope = 2.0 / static_cast<double>(V), pull = 0;
  if constexpr (kIsCosine) {
    // a row of zeros has a right angle to every other
    kd = squares * ((of_s.far == 0.0f) == (of_t.far == 0.0f) ? 0.5 : 1.0);
    const double inv_norm = static_cast<double>(of_s.near) * of_s.far / spec.inv_temperature;
    slope = inv_norm < 3e38 ? inv_norm : 3e38;
    pull = kd * of_s.far;
  }
  const float factor = static_cast<float>(slope), back = static_cast<float>(pull);
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    const vf x = without_excluded(load_n(student + i, n)) * of_s.near;
    store_n(scratch.u + i, n, factor * (load_or_zero(scratch.u + i, n) - back * x));
  });
  // there is no softmax for a sum of u to go through; NaN of a row with NaN, +inf or no class
  stats.u_sum = 0.0f * (stats.logd_s + stats.logd_t);
  scratch.q_factor = static_cast<float>(1.0 / softmax.d_s);
  scratch.u_factor = 1.0f;
  return {static_cast<float>(kd) + stats.u_sum, softmax.ce};
}

// The scales again, which are not in the statistics.
template <Divergence kDivergence>
void of_logits_recompute(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
                         const KdStats&, const KdOfRow*, KdScratch& scratch) {
  KdStats again;
  of_logits_fwd<kDivergence, false>(student, teacher, V, -1, spec, again, scratch, nullptr);
}
