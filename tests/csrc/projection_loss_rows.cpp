// Row kernel of every instruction set this processor has, against the definition in long double.
//
// Built with AddressSanitizer: every row is a heap block of exactly D floats that begins at an
// address no vector is aligned to.

#include "projection_loss_isa.cpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

namespace {

using modxfer::ProjectionLoss;
using modxfer::ProjectionNorm;
using modxfer::ProjectionRowKernel;
using modxfer::ProjectionSpec;
using Real = long double;

int failures = 0;

// D floats whose first is 4 bytes past the start of a heap block and whose last ends it.
class Row {
 public:
  explicit Row(int64_t D) : block_(new float[D + 1]), D_(D) {
    for (int64_t i = 0; i <= D; ++i) block_[i] = std::nanf("");
  }
  float* data() { return block_.get() + 1; }
  float& operator[](int64_t i) { return data()[i]; }
  void copy_from(Row& other) { std::copy_n(other.data(), D_, data()); }

 private:
  std::unique_ptr<float[]> block_;
  int64_t D_;
};

bool is_direction(const ProjectionSpec& spec) {
  return spec.loss == ProjectionLoss::kNormalizedMse || spec.loss == ProjectionLoss::kCosine;
}

// a = (x - mean) scale, and the scale; 0 where the row has no direction.
std::vector<Real> normalised(Row& x, int64_t D, const ProjectionSpec& spec, Real& scale) {
  Real mean = 0, squares = 0;
  if (spec.norm == ProjectionNorm::kLayer) {
    for (int64_t i = 0; i < D; ++i) mean += x[i];
    mean /= D;
  }
  for (int64_t i = 0; i < D; ++i) squares += (x[i] - mean) * (x[i] - mean);
  scale = spec.norm == ProjectionNorm::kNone ? 1 : 1 / std::sqrt(squares / D + spec.norm_eps);
  const Real length = std::sqrt(squares) * scale;
  if (is_direction(spec)) scale = length > modxfer::kMinLength ? scale / length : 0;
  std::vector<Real> a(D);
  for (int64_t i = 0; i < D; ++i) a[i] = (x[i] - mean) * scale;
  return a;
}

struct Truth {
  Real loss = 0;
  std::vector<Real> dz;
};

Truth truth_of(Row& z, Row& t, int64_t D, float row_weight, const ProjectionSpec& spec) {
  Truth truth;
  Real scale_z, scale_t;
  const std::vector<Real> a = normalised(z, D, spec, scale_z);
  const std::vector<Real> b = normalised(t, D, spec, scale_t);
  std::vector<Real> g(D);
  Real dot = 0, g_dot_a = 0, g_sum = 0;
  const Real beta = spec.beta;
  for (int64_t i = 0; i < D; ++i) {
    const Real e = a[i] - b[i], size = std::abs(e);
    dot += a[i] * b[i];
    switch (spec.loss) {
      case ProjectionLoss::kSmoothL1:
        truth.loss += (size < beta ? e * e / (2 * beta) : size - beta / 2) / D;
        g[i] = (size < beta ? e / beta : (e > 0) - (e < 0)) / Real(D);
        break;
      case ProjectionLoss::kMse:
        truth.loss += e * e / D;
        g[i] = 2 * e / D;
        break;
      case ProjectionLoss::kNormalizedMse:
        truth.loss += e * e;
        g[i] = 2 * e;
        break;
      case ProjectionLoss::kCosine:
        g[i] = -b[i];
    }
    g_dot_a += g[i] * a[i];
    g_sum += g[i];
  }
  if (spec.loss == ProjectionLoss::kCosine) truth.loss = 1 - dot;
  Real k = 0;
  if (is_direction(spec)) {
    k = g_dot_a;
  } else if (spec.norm != ProjectionNorm::kNone) {
    k = g_dot_a / D;
  }
  const Real g_mean = spec.norm == ProjectionNorm::kLayer ? g_sum / D : 0;
  for (int64_t i = 0; i < D; ++i) {
    truth.dz.push_back(row_weight * scale_z * (g[i] - a[i] * k - g_mean));
  }
  return truth;
}

void expect_near(Real actual, Real expected, Real tolerance, const char* isa, const char* what,
                 int64_t D, const ProjectionSpec& spec) {
  if (std::abs(actual - expected) <= tolerance) return;
  std::fprintf(stderr, "%s %s: %.9Lg, expected %.9Lg (D %lld, loss %d, norm %d, beta %g)\n", isa,
               what, actual, expected, static_cast<long long>(D), static_cast<int>(spec.loss),
               static_cast<int>(spec.norm), spec.beta);
  if (++failures > 20) std::exit(EXIT_FAILURE);
}

void check_row(const ProjectionRowKernel& kernel, Row& z, Row& t, int64_t D,
               const ProjectionSpec& spec) {
  const float row_weight = 0.75f;
  const Truth truth = truth_of(z, t, D, row_weight, spec);
  // values are a few units: some roundings of their squares, and of a gradient relative to its own
  Real largest = 0;
  for (Real dz : truth.dz) largest = std::max(largest, std::abs(dz));
  Real scale, other;
  normalised(z, D, spec, scale);
  normalised(t, D, spec, other);
  const Real per_column = is_direction(spec) ? 1 : Real(1) / D;
  const Real loss_tolerance = 2e-6L * std::max<Real>(1, truth.loss);
  const Real dz_tolerance = 4e-6L * (largest + scale * per_column * (is_direction(spec) ? 1 : 8));

  Row dz(D), in_place(D);
  const float loss = kernel.row(z.data(), t.data(), D, row_weight, spec, dz.data());
  expect_near(loss, truth.loss, loss_tolerance, kernel.isa, "loss", D, spec);
  in_place.copy_from(z);
  kernel.row(in_place.data(), t.data(), D, row_weight, spec, in_place.data());
  for (int64_t i = 0; i < D; ++i) {
    expect_near(dz[i], truth.dz[i], dz_tolerance, kernel.isa, "dz", D, spec);
    expect_near(in_place[i], dz[i], 0, kernel.isa, "dz in place", D, spec);
  }
  const float alone = kernel.row(z.data(), t.data(), D, row_weight, spec, nullptr);
  expect_near(alone, loss, 0, kernel.isa, "loss alone", D, spec);
}

}  // namespace

int main() {
  std::vector<int64_t> sizes;
  for (int64_t D = 1; D <= 81; ++D) sizes.push_back(D);  // every remainder of 16 and of 64
  for (int64_t D : {1023, 1024, 1025, 1039, 2047, 2049, 3001})
    sizes.push_back(D);  // blocks of 1024
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (modxfer::Isa isa : modxfer::kIsas) {
    if (!modxfer::has_isa(isa)) continue;
    modxfer::isa_in_use() = isa;
    const ProjectionRowKernel& kernel = modxfer::projection_row_kernel();
    int rows = 0;
    for (int64_t D : sizes) {
      for (float delta : {0.0f, 0.03f, 1.0f}) {
        Row z(D), t(D);
        for (int64_t i = 0; i < D; ++i) {
          t[i] = normal(random);
          z[i] = t[i] + delta * normal(random);
        }
        t[D / 2] += 8.0f;
        for (int loss = 0; loss < 4; ++loss) {
          for (int norm = 0; norm < 3; ++norm) {
            const float beta = 0.3f;
            const ProjectionSpec spec{static_cast<ProjectionLoss>(loss), beta, 1.0f / beta,
                                      static_cast<ProjectionNorm>(norm), 1e-3f};
            check_row(kernel, z, t, D, spec);
            ++rows;
          }
        }
      }
    }
    std::printf("%s: %d rows\n", kernel.isa, rows);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
