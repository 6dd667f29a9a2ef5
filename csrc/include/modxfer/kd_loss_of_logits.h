// The divergences of the logits themselves, x of the student and y of the teacher, for vectors of a
// CPU and scalars of a GPU alike.
//
//   logits_mse      sum gap^2 / V    gap = x - y            u = 2 / V gap
//   logits_cosine   sum gap^2 / 2    gap = x/|x| - y/|y|    u = (gap - D x/|x|) / |x|
//
// The second is 1 - x y / (|x| |y|), and does not cancel where the rows are near.
//
// Included inside a namespace, after kd_loss_terms.h, that has power_of_2 and sqrt_of of one
// number; no include guard and no includes of its own. Formulas in kernels/divergences.py.

// z near far is what a row of logits z is compared by. `near` is a power of 2, by which a product
// is exact: equal rows have a gap of 0, to the bit, contracted to an fma or not.
struct LogitScale {
  float near;
  float far;
};

MODXFER_INLINE vf without_excluded(vf z) { return select(z == -__builtin_inff(), vf{}, z); }

// Of a row whose largest size is `most`, at least kLeastSize: no square overflows.
constexpr float kLeastSize = 1e-30f;
MODXFER_INLINE float near_of(float most) { return 0.5f / power_of_2(most < 1e30f ? most : 1e30f); }

// Of length 1; `far` is 0 of a row of zeros. squared: sum of (z near)^2.
template <class Number>
MODXFER_INLINE LogitScale unit_scale(float near, Number squared) {
  return {near, squared == 0 ? 0.0f : static_cast<float>(1 / sqrt_of(squared))};
}

struct LogitGap {
  vf gap;
  vf x;
};

MODXFER_INLINE LogitGap logit_gap(vf z_s, vf z_t, const LogitScale& of_s, const LogitScale& of_t) {
  const vf x = without_excluded(z_s) * of_s.near, y = without_excluded(z_t) * of_t.near;
  const vf gap = of_s.far * (x - y) + (of_s.far - of_t.far) * y;
  const vi is_apart = (z_s == -__builtin_inff()) ^ (z_t == -__builtin_inff());
  return {select(is_apart, splat(__builtin_inff()), gap), x};
}

// |x| of the logits z that are so scaled.
template <class Number>
MODXFER_INLINE Number length_of(const LogitScale& scale, float inv_temperature) {
  const Number inverse = static_cast<Number>(scale.near) * scale.far;
  return inverse == 0 ? inverse : inv_temperature / inverse;
}

MODXFER_INLINE LogitScale scale_of(float length, float inv_temperature) {
  const float of_z = length / inv_temperature;
  const float near = near_of(of_z > kLeastSize ? of_z : kLeastSize);
  return {near, of_z == 0.0f ? 0.0f : 1.0f / (of_z * near)};
}

// The divergence, and u = factor (gap - back x) of each class.
template <class Number>
struct OfLogits {
  Number kd;
  float factor;
  float back;
};

template <class Number>
MODXFER_INLINE OfLogits<Number> of_cosine(Number kd, const LogitScale& of_s,
                                          float inv_temperature) {
  const Number inv_norm = static_cast<Number>(of_s.near) * of_s.far / inv_temperature;
  const float most = 3e38f;
  return {kd, inv_norm < most ? static_cast<float>(inv_norm) : most,
          static_cast<float>(kd * of_s.far)};
}

// squares: sum of gap^2 over V classes.
template <Divergence kDivergence, class Number>
MODXFER_INLINE OfLogits<Number> of_squares(Number squares, Number V, const LogitScale& of_s,
                                           const LogitScale& of_t, float inv_temperature) {
  if constexpr (kDivergence == Divergence::kLogitsMse) {
    return {squares / V, static_cast<float>(2 / V), 0.0f};
  } else {
    // a row of zeros has a right angle to every other
    const bool is_right = (of_s.far == 0.0f) != (of_t.far == 0.0f);
    return of_cosine(is_right ? squares : squares / 2, of_s, inv_temperature);
  }
}

// Of some of the classes of a row: `sums` of the divergence's record, `num_sums` of them.
template <Divergence kDivergence, class Number>
MODXFER_INLINE void put_logit_sums(Number squares, Number V, const LogitScale& of_s,
                                   const LogitScale& of_t, float inv_temperature, Number* sums) {
  if constexpr (kDivergence == Divergence::kLogitsMse) {
    sums[0] = squares;
    sums[1] = V;
  } else {
    sums[0] = length_of<Number>(of_s, inv_temperature);
    sums[1] = length_of<Number>(of_t, inv_temperature);
    sums[2] = of_squares<kDivergence>(squares, V, of_s, of_t, inv_temperature).kd;
  }
}

// What u of such a class is made of, from the numbers of the whole row.
template <Divergence kDivergence>
MODXFER_INLINE OfLogits<float> of_numbers(const float* numbers, float inv_temperature,
                                          LogitScale& of_s, LogitScale& of_t) {
  if constexpr (kDivergence == Divergence::kLogitsMse) {
    of_s = of_t = {1.0f, inv_temperature};
    return {0.0f, numbers[0], 0.0f};
  } else {
    of_s = scale_of(numbers[0], inv_temperature);
    of_t = scale_of(numbers[1], inv_temperature);
    return of_cosine(numbers[2], of_s, inv_temperature);
  }
}
