// Row kernels of the cross entropy. Included once per instruction set after vec.h, by each_isa.h.
//
//   sums    1. maximum   2. e^x, kept where the gradient will lie, and its sums
//   scale   dlogits = e^x * scale - shift; the caller subtracts the label's part
//
// Memory sees each logit once where a row fits the second-level cache, and each exponential is
// computed once. Sums run in float over kBlock elements and in double across blocks.

template <bool kKeeps, bool kMore>
CeSums ce_row_sums(const float* logits, int64_t V, float* kept) {
  // logits past the end of the row are -inf, classes without probability
  const auto load_n = [](const float* src, int n) __attribute__((always_inline)) {
    return n == kLanes ? load(src) : load_tail(src, n, -__builtin_inff());
  };
  vf max = splat(-__builtin_inff());
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    max = vmax(load_n(logits + i, n), max);
  });
  CeSums sums{reduce_max(max), 0, 0, 0};
  const Rate natural = natural_rate();
  const vf top = splat(sums.max);
  for (int64_t block = 0; block < V; block += kBlock) {
    const int64_t end = block + kBlock < V ? block + kBlock : V;
    vf sum{}, sum_x{}, sum_e_x{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf x = load_n(logits + i, n) - top;
      const vf e = vexp_below(x, natural);
      sum += e;
      if constexpr (kMore) {
        sum_x += n == kLanes ? x : load_tail(logits + i, n, sums.max) - sums.max;
        sum_e_x += select(e == 0.0f, vf{}, e * x);
      }
      if constexpr (kKeeps) store_n(kept + i, n, e);
    });
    sums.d += reduce_sum(sum);
    if constexpr (kMore) {
      sums.x_sum += reduce_sum(sum_x);
      sums.e_x_sum += reduce_sum(sum_e_x);
    }
  }
  return sums;
}

static void ce_row_scale(float* kept, int64_t V, float scale, float shift) {
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    store_n(kept + i, n, load_or_zero(kept + i, n) * scale - shift);
  });
}

constexpr CeRowKernels kKernels{
    kIsaName,
    {{ce_row_sums<false, false>, ce_row_sums<false, true>},
     {ce_row_sums<true, false>, ce_row_sums<true, true>}},
    ce_row_scale,
};
