// The stages of a row whose classes several ranks share. Included by kd_loss_rows.h, once per
// instruction set; between two of them the ranks tell each other what they found.
//
//   stats   1. maxima   2. sums of e^x, and what follows from them
//   sums    of f and u, from the statistics of the whole row
//   write   row_recompute and row_grad, from both

template <Divergence kDivergence, bool kMore>
void row_part(const float* student, const float* teacher, int64_t V, int64_t label,
              const KdSpec& spec, KdPart& part) {
  constexpr float kInf = __builtin_inff();
  constexpr bool kUnderP = kDivergence == Divergence::kForwardKl;
  constexpr bool kUnderQ = kDivergence == Divergence::kReverseKl;
  vf max_s = splat(-kInf), max_t = max_s;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    max_s = vmax(load_n(student + i, n), max_s);
    max_t = vmax(load_n(teacher + i, n), max_t);
  });
  const float top_s = reduce_max(max_s), top_t = reduce_max(max_t);
  // a rank may have none but excluded classes, whose e^x are 0
  const float base_s = top_s == -kInf ? 0.0f : top_s, base_t = top_t == -kInf ? 0.0f : top_t;

  const bool needs_d1 = spec.inv_temperature != 1.0f;
  const Rate rate = rate_of(spec.rate), natural = natural_rate();
  double d_s = 0, d_t = 0, d_1 = 0, cross = 0, x_sum = 0, e_x_s = 0, e_x_t = 0;
  vi shared{};
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum_s{}, sum_t{}, sum_1{}, sum_cross{}, sum_x{}, sum_e_x_s{}, sum_e_x_t{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf x_s = load_n(student + i, n) - base_s;
      const vf x_t = load_n(teacher + i, n) - base_t;
      const vf e_s = vexp_below(x_s, rate);
      const vf e_t = vexp_below(x_t, rate);
      sum_s += e_s;
      sum_t += e_t;
      if (needs_d1) sum_1 += vexp_below(x_s, natural);
      if constexpr (kUnderP) sum_cross += select(e_t == 0.0f, vf{}, e_t * (x_t - x_s));
      if constexpr (kUnderQ) sum_cross += select(e_s == 0.0f, vf{}, e_s * (x_s - x_t));
      if constexpr (kMore) {
        sum_x += n == kLanes ? x_s : load_tail(student + i, n, base_s) - base_s;
        sum_e_x_s += select(e_s == 0.0f, vf{}, e_s * x_s);
        sum_e_x_t += select(e_t == 0.0f, vf{}, e_t * x_t);
        shared |= (x_s == 0.0f) & (x_t == 0.0f);
      }
    });
    d_s += reduce_sum(sum_s);
    d_t += reduce_sum(sum_t);
    d_1 += reduce_sum(sum_1);
    cross += reduce_sum(sum_cross);
    if constexpr (kMore) {
      x_sum += reduce_sum(sum_x);
      e_x_s += reduce_sum(sum_e_x_s);
      e_x_t += reduce_sum(sum_e_x_t);
    }
  }
  const double scale = spec.inv_temperature;
  part.max_s = top_s;
  part.d_s = d_s;
  part.max_t = top_t;
  part.d_t = d_t;
  part.d_1 = needs_d1 ? d_1 : d_s;
  part.mean = kUnderP   ? cross / d_t * scale + __builtin_log(d_s / d_t)
              : kUnderQ ? cross / d_s * scale + __builtin_log(d_t / d_s)
                        : 0.0;
  part.mean_x = x_sum / static_cast<double>(V);
  part.z_label = 0 <= label && label < V ? student[label] : 0.0;
  part.mean_x_s = e_x_s / d_s;
  part.mean_x_t = e_x_t / d_t;
  part.is_top_shared = 0.0;
  for (int i = 0; i < kLanes; ++i) part.is_top_shared = shared[i] ? 1.0 : part.is_top_shared;
}

// sums: f and u over these classes.
template <Divergence kDivergence>
void row_sums(const float* student, const float* teacher, int64_t V, const KdSpec& spec,
              const KdStats& stats, double* sums) {
  sums[0] = sums[1] = 0.0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum_f{}, sum_u{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Class x = class_of(student, teacher, i, n, spec, stats);
      const Terms terms = class_terms<kDivergence>(x, spec);
      sum_f += terms.f;
      sum_u += terms.u;
    });
    sums[0] += reduce_sum(sum_f);
    sums[1] += reduce_sum(sum_u);
  }
}
