// Passes over a row of logits, of which the K largest are wanted. Included once per instruction set
// after vec.h, by each_isa.h.
//
//   maxima      of groups of logits: K of them that are as large as some number are K logits that
//               are, so the K-th largest maximum is a bound of the K-th largest logit
//   collect     those that reach the bound, few more than K, and e^x of all others with its sum

static int64_t row_maxima(const float* logits, int64_t V, int64_t vectors, float* maxima) {
  const int64_t size = vectors * kLanes;
  float* out = maxima;
  for (int64_t group = 0; group < V; group += size, out += kLanes) {
    const int64_t end = group + size < V ? group + size : V;
    vf top = splat(-__builtin_inff());
    for_each_vector(group, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      top = vmax(n == kLanes ? load(logits + i) : load_tail(logits + i, n, -__builtin_inff()), top);
    });
    store(out, top);
  }
  return out - maxima;
}

static int64_t row_collect(const float* logits, const float* z, int64_t V, float bound, float top,
                           float rate, int32_t* indices, double& rest) {
  constexpr int64_t kStep = 8 * kLanes;
  const auto load_n = [](const float* src, int n) __attribute__((always_inline)) {
    return n == kLanes ? load(src) : load_tail(src, n, -__builtin_inff());
  };
  const Rate of = rate_of(rate);
  int64_t count = 0;
  rest = 0.0;
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t last = block + kBlock < V ? block + kBlock : V;
    vf sum{};
    for (int64_t step = block; step < last; step += kStep) {
      const int64_t end = step + kStep < last ? step + kStep : last;
      vf high = splat(-__builtin_inff());
      for_each_vector(step, end, [&](int64_t i, int n) __attribute__((always_inline)) {
        const vf logit = load_n(logits + i, n);
        const vf e = vexp_below(load_n(z + i, n) - top, of);
        sum += select(logit >= bound, vf{}, e);  // NaN is below
        high = vmax(logit, high);
      });
      if (reduce_max(high) < bound) continue;
      for (int64_t i = step; i < end; ++i) {  // no branch: which reach it is hard to foretell
        indices[count] = static_cast<int32_t>(i);
        count += logits[i] >= bound;
      }
    }
    rest += reduce_sum(sum);
  }
  return count;
}

constexpr TopKKernels kKernels{kIsaName, kLanes, row_maxima, row_collect};
