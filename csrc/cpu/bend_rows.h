// Bends a row of logits and its gradient. Included once per instruction set after vec.h, by
// each_isa.h.

template <bool kBiased>
void row_bend(const float* x, int64_t V, const Bend& bend, float* z) {
  const auto raw_at = [=](int64_t i, int n) __attribute__((always_inline)) {
    vf raw = load_or_zero(x + i, n);
    if constexpr (kBiased) raw += load_or_zero(bend.bias + i, n);
    return raw;
  };
  if (bend.cap == 0.0f) {
    for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
      store_n(z + i, n, raw_at(i, n) * bend.scale);
    });
    return;
  }
  const float inner = bend.scale / bend.cap;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    const vf raw = raw_at(i, n);
    const vi is_infinite = vabs(raw) == __builtin_inff();
    store_n(z + i, n, select(is_infinite, raw, bend.cap * vtanh(raw * inner)));
  });
}

void row_bend(const float* x, int64_t V, const Bend& bend, float* z) {
  bend.bias == nullptr ? row_bend<false>(x, V, bend, z) : row_bend<true>(x, V, bend, z);
}

void row_unbend(const float* z, int64_t V, const Bend& bend, float* gradient) {
  if (bend.cap == 0.0f) {
    for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
      store_n(gradient + i, n, load_or_zero(gradient + i, n) * bend.scale);
    });
    return;
  }
  const float inverse_cap = 1.0f / bend.cap;
  for_each_vector(0, V, [&](int64_t i, int n) __attribute__((always_inline)) {
    // bounded, because an excluded class has z = -inf and no gradient
    const vf t = vmax(vmin(load_or_zero(z + i, n) * inverse_cap, splat(1.0f)), splat(-1.0f));
    const vf slope = bend.scale * (1.0f - t * t);
    store_n(gradient + i, n, load_or_zero(gradient + i, n) * slope);
  });
}

constexpr BendRowKernels kKernels{kIsaName, row_bend, row_unbend};
