// Floats as a compiler vector type of MODXFER_VECTOR_BYTES, the width of a register, and the
// transcendental functions a row kernel needs.
//
// Included once per instruction set by each_isa.h, inside that set's namespace and target pragma,
// so that the vectors lower to its registers: no include guard and no includes of its own.

typedef float vf __attribute__((vector_size(MODXFER_VECTOR_BYTES)));
typedef int vi __attribute__((vector_size(MODXFER_VECTOR_BYTES)));

constexpr int kLanes = MODXFER_VECTOR_BYTES / sizeof(float);
// Elements whose sum runs in float, before it goes on in double.
constexpr int64_t kBlock = 64 * kLanes;

#define MODXFER_INLINE static inline __attribute__((always_inline))

MODXFER_INLINE vf splat(float x) { return x - vf{}; }  // exact, unlike 0 + x of -0

MODXFER_INLINE vf load(const float* src) {
  vf x;
  __builtin_memcpy(&x, src, sizeof(x));
  return x;
}

// The last n < kLanes elements of a row; the other lanes hold `fill`.
MODXFER_INLINE vf load_tail(const float* src, int n, float fill) {
  vf x = splat(fill);
  __builtin_memcpy(&x, src, n * sizeof(float));
  return x;
}

MODXFER_INLINE void store(float* dst, vf x) { __builtin_memcpy(dst, &x, sizeof(x)); }

MODXFER_INLINE void store_tail(float* dst, int n, vf x) {
  __builtin_memcpy(dst, &x, n * sizeof(float));
}

// Calls body(index, count) for each vector of [begin, end); count < kLanes at the tail.
template <class Body>
MODXFER_INLINE void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, kLanes);
  if (i < end) body(i, static_cast<int>(end - i));
}

MODXFER_INLINE vf load_or_zero(const float* src, int n) {
  return n == kLanes ? load(src) : load_tail(src, n, 0.0f);
}

// The row ends where it ends: a buffer holds exactly its values.
MODXFER_INLINE void store_n(float* dst, int n, vf x) {
  if (n == kLanes) {
    store(dst, x);
  } else {
    store_tail(dst, n, x);
  }
}

MODXFER_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
MODXFER_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
MODXFER_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
MODXFER_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

MODXFER_INLINE float reduce_max(vf x) {
  float m = x[0];
  for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

MODXFER_INLINE double reduce_sum(vf x) {
  double s[4] = {x[0], x[1], x[2], x[3]};  // four chains of additions, not one
  for (int i = 4; i < kLanes; ++i) s[i % 4] += x[i];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// e^x to 1.2 ulp for x <= 88; 0 below -87.3 (no subnormals), NaN stays NaN.
// Range reduction x = n ln2 + r, |r| <= ln2 / 2, then a polynomial (Cephes expf).
MODXFER_INLINE vf vexp(vf x) {
  const vf clamped = vmin(vmax(x, splat(-87.33654f)), splat(88.37626f));
  // adding and subtracting 1.5 * 2^23 rounds to the nearest integer
  const vf magic = splat(12582912.0f);
  const vf shifted = clamped * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  vf r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const vi exponent = ((vi)shifted - (vi)magic) << 23;
  const vf result = (vf)((vi)y + exponent);
  return select(x < -87.33654f, vf{}, select(x == x, result, x));
}

// A factor of `vexp_below`, as vectors that a loop holds in registers.
struct Rate {
  vf log2;   // what an argument is multiplied by in 2^x
  vf least;  // arguments below have no power
  vf none;   // in their place: its exponent field is 0
};

// Of e^(factor x); log2 = factor log2(e), rounded once.
MODXFER_INLINE Rate rate_of(float log2) {
  return {splat(log2), splat(-125.999f / log2), splat(-127.0f / log2)};
}

// e^x
MODXFER_INLINE Rate natural_rate() { return rate_of(1.44269504f); }

// e^(factor x) for x <= 0, to 1 ulp and 2^-26 of the exponent; 0 below 2^-126 (no subnormals), NaN
// stays NaN. 2^(n + r), |r| <= 1/2: the product with the rate is rounded once, less n.
MODXFER_INLINE vf vexp_below(vf x, const Rate& rate) {
  const vf bounded = select(x < rate.least, rate.none, x);
  // adding 1.5 * 2^23 rounds to the nearest integer; 127 more and its low bits are the exponent's
  const vf magic = splat(12583039.0f);
  const vf shifted = bounded * rate.log2 + magic;
  const vf r = bounded * rate.log2 - (shifted - magic);
  vf y = splat(1.535336196e-4f);
  y = y * r + 1.339887385e-3f;
  y = y * r + 9.618436918e-3f;
  y = y * r + 5.550332367e-2f;
  y = y * r + 2.402264774e-1f;
  y = y * r + 6.931471825e-1f;
  y = y * r + 1.0f;
  return y * (vf)((vi)shifted << 23);
}

// tanh to 2 ulp; an argument beyond 10 gives exactly +-1, NaN stays NaN.
// Least maximum error polynomial of (tanh(x) / x - 1) / x^2 where 1 - e^-2x would cancel.
MODXFER_INLINE vf vtanh(vf x) {
  const vf size = vabs(x);
  const vf s = x * x;
  vf poly = splat(-0.00609671417f);
  poly = poly * s + 0.020997179f;
  poly = poly * s + -0.0538509096f;
  poly = poly * s + 0.133327697f;
  poly = poly * s + -0.333333289f;
  const vf small = x + x * (s * poly);
  const vf e = vexp(-2.0f * size);
  const vf large = (1.0f - e) / (1.0f + e);
  const vf signed_large = select(x < 0.0f, -large, large);
  return select(size < 0.625f, small, signed_large);
}

// log(1 + y) for y in [0, 1], to 1.2 ulp also of small y. Least maximum error polynomial.
MODXFER_INLINE vf vlog1p_unit(vf y) {
  vf poly = splat(-3.244021209e-3f);
  poly = poly * y + 1.985144429e-2f;
  poly = poly * y + -5.695949867e-2f;
  poly = poly * y + 1.060365140e-1f;
  poly = poly * y + -1.530559063e-1f;
  poly = poly * y + 1.967593879e-1f;
  poly = poly * y + -2.495413423e-1f;
  poly = poly * y + 3.332996368e-1f;
  poly = poly * y + -4.999990165e-1f;
  poly = poly * y + 1.0f;
  return y * poly;
}

// log(e^a + e^b); a or b may be infinite.
MODXFER_INLINE vf vlogaddexp(vf a, vf b) {
  const vf top = vmax(a, b);
  const vf gap = select(a == b, vf{}, vabs(a - b));
  return top + vlog1p_unit(vexp(-gap));
}

// --- of one number, in which sums over a row go on

MODXFER_INLINE double log_of(double x) { return __builtin_log(x); }
MODXFER_INLINE double log1p_of(double x) { return __builtin_log1p(x); }
MODXFER_INLINE double exp_of(double x) { return __builtin_exp(x); }
MODXFER_INLINE double sqrt_of(double x) { return __builtin_sqrt(x); }

// The one that is not above x, a normal number.
MODXFER_INLINE float power_of_2(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  bits &= 0x7F800000;
  __builtin_memcpy(&x, &bits, sizeof(bits));
  return x;
}
