// Passes over a row of logits, of which the K largest are wanted. Included once per instruction set
// after vec.h, by each_isa.h.
//
//   maxima      of groups of logits: K of them that are as large as some number are K logits that
//               are, so the K-th largest maximum is a bound of the K-th largest logit
//   collect     those that reach the bound, few more than K, and e^x of all others with its sum

MODXFER_INLINE bool any(vi mask) {
  uint64_t words[sizeof(mask) / sizeof(uint64_t)], found = 0;
  __builtin_memcpy(words, &mask, sizeof(mask));
  for (uint64_t word : words) found |= word;
  return found != 0;
}

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
      vi reached{};
      for_each_vector(step, end, [&](int64_t i, int n) __attribute__((always_inline)) {
        const vi reaches = load_n(logits + i, n) >= bound;  // NaN does not
        sum += select(reaches, vf{}, vexp_below(load_n(z + i, n) - top, of));
        reached |= reaches;
      });
      if (!any(reached)) continue;
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
