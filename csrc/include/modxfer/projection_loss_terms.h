// What an element adds to the loss of a row of hidden states, for vectors of a CPU and scalars of a
// GPU alike.
//
// Included inside a namespace that has vf and the functions of modxfer/vec.h, after
// modxfer/projection_loss.h; no include guard and no includes of its own. Formulas in
// kernels/projection_loss/reference.py.

// Whether both rows are divided by their length.
MODXFER_INLINE constexpr bool is_direction(ProjectionLoss loss) {
  return loss == ProjectionLoss::kNormalizedMse || loss == ProjectionLoss::kCosine;
}

// Of g, in the derivative of the loss of a row of so many elements.
MODXFER_INLINE float slope_factor(ProjectionLoss loss, float width) {
  switch (loss) {
    case ProjectionLoss::kNormalizedMse:
      return 2.0f;
    case ProjectionLoss::kCosine:
      return 1.0f;
    case ProjectionLoss::kSmoothL1:
      return 1.0f / width;
    default:
      return 2.0f / width;
  }
}

struct ProjectionTerms {
  vf f;  // addend of the loss
  vf g;  // its derivative in a, both up to a factor of the row
};

// Of e = a - b.
template <ProjectionLoss kLoss>
MODXFER_INLINE ProjectionTerms projection_terms(vf e, const ProjectionSpec& spec) {
  if constexpr (kLoss == ProjectionLoss::kSmoothL1) {
    const vf size = vabs(e);
    // 0 / 0 at e = 0 when beta is 0
    const vf ratio = select(size == 0.0f, vf{}, vmin(size * spec.inv_beta, splat(1.0f)));
    return {ratio * (size - 0.5f * vmin(size, splat(spec.beta))), select(e < 0.0f, -ratio, ratio)};
  } else {
    return {e * e, e};
  }
}
