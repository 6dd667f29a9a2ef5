// Row kernel of the projection loss. Included once per instruction set after vec.h, by each_isa.h.
//
//   statistics   mean and scale of both rows, so that a = (z - mean) scale; none without a norm
//   loss         terms of e = a - b, and the sums that the gradient of a statistic needs
//   gradient     dz; joins the pass before it when there are no statistics
//
// A row of a few thousand floats stays in the first cache between two passes. Sums run in float
// over kBlock elements and in double across blocks.

#include "modxfer/projection_loss_terms.h"

// scale is 0 where the row has no direction.
struct Side {
  float mean;
  float scale;
};

// Elements past the end of the row are at the mean: a and b are 0 there.
template <ProjectionLoss kLoss, ProjectionNorm kNorm>
MODXFER_INLINE vf normalised(const float* src, int n, const Side& side) {
  vf x = n == kLanes ? load(src) : load_tail(src, n, side.mean);
  if constexpr (kNorm == ProjectionNorm::kLayer) x -= side.mean;
  if constexpr (kNorm != ProjectionNorm::kNone || is_direction(kLoss)) x *= side.scale;
  return x;
}

// Sum of term(index, count) over the vectors of a row; four sums at once hide an addition's
// latency.
template <class Term>
MODXFER_INLINE double sum_of(int64_t D, const Term& term) {
  double total = 0;
  for (int64_t block = 0; block < D; block += kBlock) {
    const int64_t end = block + kBlock < D ? block + kBlock : D;
    vf sums[4] = {};
    int64_t i = block;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) sums[j] += term(i + j * kLanes, kLanes);
    }
    for_each_vector(i, end, [&](int64_t index, int n) __attribute__((always_inline)) {
      sums[0] += term(index, n);
    });
    total += reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

template <ProjectionLoss kLoss, ProjectionNorm kNorm>
MODXFER_INLINE Side side_of(const float* x, int64_t D, const ProjectionSpec& spec) {
  Side side{0.0f, 1.0f};
  if constexpr (kNorm != ProjectionNorm::kNone || is_direction(kLoss)) {
    if constexpr (kNorm == ProjectionNorm::kLayer) {
      const double sum = sum_of(D, [&](int64_t i, int n) __attribute__((always_inline)) {
        return load_or_zero(x + i, n);
      });
      side.mean = static_cast<float>(sum / D);
    }
    const double squares = sum_of(D, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf centred = normalised<kLoss, kNorm>(x + i, n, side);
      return centred * centred;
    });
    double scale = 1.0;
    if constexpr (kNorm != ProjectionNorm::kNone) {
      scale = 1.0 / __builtin_sqrt(squares / D + spec.norm_eps);
    }
    if constexpr (is_direction(kLoss)) {
      const double length = __builtin_sqrt(squares) * scale;
      scale = length > kMinLength ? scale / length : 0.0;
    }
    side.scale = static_cast<float>(scale);
  }
  return side;
}

template <ProjectionLoss kLoss, ProjectionNorm kNorm>
float row_as(const float* z, const float* t, int64_t D, float row_weight,
             const ProjectionSpec& spec, float* dz) {
  constexpr bool kHasStatistics = kNorm != ProjectionNorm::kNone || is_direction(kLoss);
  const Side side_z = side_of<kLoss, kNorm>(z, D, spec);
  const Side side_t = side_of<kLoss, kNorm>(t, D, spec);
  const float grad = row_weight * slope_factor(kLoss, static_cast<float>(D)) * side_z.scale;

  double f_sum = 0, ga_sum = 0, g_sum = 0;
  for (int64_t block = 0; block < D; block += kBlock) {
    const int64_t end = block + kBlock < D ? block + kBlock : D;
    vf sum_f{}, sum_ga{}, sum_g{};
    for_each_vector(block, end, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf a = normalised<kLoss, kNorm>(z + i, n, side_z);
      const vf b = normalised<kLoss, kNorm>(t + i, n, side_t);
      const ProjectionTerms terms = projection_terms<kLoss>(a - b, spec);
      sum_f += terms.f;
      if constexpr (kHasStatistics) {
        sum_ga += terms.g * a;
        sum_g += terms.g;
      } else if (dz != nullptr) {
        store_n(dz + i, n, grad * terms.g);
      }
    });
    f_sum += reduce_sum(sum_f);
    if constexpr (kHasStatistics) {
      ga_sum += reduce_sum(sum_ga);
      g_sum += reduce_sum(sum_g);
    }
  }

  if (kHasStatistics && dz != nullptr) {
    const float k = static_cast<float>(is_direction(kLoss) ? ga_sum : ga_sum / D);
    const float g_mean = kNorm == ProjectionNorm::kLayer ? static_cast<float>(g_sum / D) : 0.0f;
    for_each_vector(0, D, [&](int64_t i, int n) __attribute__((always_inline)) {
      const vf a = normalised<kLoss, kNorm>(z + i, n, side_z);
      const vf b = normalised<kLoss, kNorm>(t + i, n, side_t);
      store_n(dz + i, n, grad * (projection_terms<kLoss>(a - b, spec).g - a * k - g_mean));
    });
  }
  if constexpr (kLoss == ProjectionLoss::kCosine) {
    // 1 - cos is half the squared distance of two directions; next to a row without one it is 1
    return static_cast<float>(0.5 * (f_sum + (side_z.scale == 0.0f) + (side_t.scale == 0.0f)));
  }
  return static_cast<float>(kLoss == ProjectionLoss::kNormalizedMse ? f_sum : f_sum / D);
}

template <ProjectionLoss kLoss>
float row_with(const float* z, const float* t, int64_t D, float row_weight,
               const ProjectionSpec& spec, float* dz) {
  switch (spec.norm) {
    case ProjectionNorm::kRms:
      return row_as<kLoss, ProjectionNorm::kRms>(z, t, D, row_weight, spec, dz);
    case ProjectionNorm::kLayer:
      return row_as<kLoss, ProjectionNorm::kLayer>(z, t, D, row_weight, spec, dz);
    default:
      return row_as<kLoss, ProjectionNorm::kNone>(z, t, D, row_weight, spec, dz);
  }
}

float projection_row(const float* z, const float* t, int64_t D, float row_weight,
                     const ProjectionSpec& spec, float* dz) {
  switch (spec.loss) {
    case ProjectionLoss::kNormalizedMse:
      return row_with<ProjectionLoss::kNormalizedMse>(z, t, D, row_weight, spec, dz);
    case ProjectionLoss::kCosine:
      return row_with<ProjectionLoss::kCosine>(z, t, D, row_weight, spec, dz);
    case ProjectionLoss::kSmoothL1:
      return row_with<ProjectionLoss::kSmoothL1>(z, t, D, row_weight, spec, dz);
    default:
      return row_with<ProjectionLoss::kMse>(z, t, D, row_weight, spec, dz);
  }
}

constexpr ProjectionRowKernel kKernels{kIsaName, projection_row};
