// The names of modxfer/vec.h for a thread, whose vector is one float. Included inside a namespace.

#define MODXFER_INLINE MODXFER_DEVICE

using vf = float;
using vi = bool;

MODXFER_INLINE vf splat(float x) { return x; }
MODXFER_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
MODXFER_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
MODXFER_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
MODXFER_INLINE vf vabs(vf a) { return a < 0.0f ? -a : a; }
MODXFER_INLINE vf vexp(vf x) { return device::exp2_approx(x * 1.44269504f); }

// log(1 + y) for y in [0, 1]: of small y by a series, where 1 + y has lost it.
MODXFER_INLINE vf vlog1p_unit(vf y) {
  const vf series = y * (1.0f + y * (-0.5f + y * (1.0f / 3.0f + y * -0.25f)));
  return y < 0.01f ? series : device::log2_approx(1.0f + y) * 0.69314718f;
}

MODXFER_INLINE float log_of(float x) { return device::log(x); }
MODXFER_INLINE float log1p_of(float x) { return device::log1p(x); }
MODXFER_INLINE float exp_of(float x) { return device::exp(x); }
MODXFER_INLINE float sqrt_of(float x) { return device::sqrt(x); }
MODXFER_INLINE float power_of_2(float x) { return device::power_of_2(x); }
