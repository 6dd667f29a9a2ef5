// Loops of the streaming moments of every instruction set this processor has, against their
// definition in long double.
//
// Built with AddressSanitizer: every row is a heap block of exactly D values.

#include "correlation_isa.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using modxfer::CorrelationKernels;
using Real = long double;

int failures = 0;

void expect_near(Real actual, Real expected, Real tolerance, const char* what, int64_t D) {
  if (std::abs(actual - expected) <= tolerance) return;
  std::fprintf(stderr, "%s: %.12Lg, expected %.12Lg (D %lld)\n", what, actual, expected,
               static_cast<long long>(D));
  if (++failures > 20) std::exit(EXIT_FAILURE);
}

// `count` rows, all of them through one call of `centre`; in place or into rows of their own.
void check_rows(void (*centre)(const float* const*, const float*, int64_t, float* const*, double*,
                               double*),
                int count, int64_t D, bool in_place, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> shift(D);
  std::vector<std::vector<float>> x(count, std::vector<float>(D)), out = x;
  for (float& value : shift) value = 10.0f * normal(random);
  for (auto& row : x) {
    for (int64_t i = 0; i < D; ++i) row[i] = shift[i] + normal(random);
  }
  const std::vector<std::vector<float>> before = x;
  std::vector<double> sum(D, 1.0), square(D, 2.0);
  std::vector<const float*> from;
  std::vector<float*> to;
  for (int row = 0; row < count; ++row) {
    from.push_back(x[row].data());
    to.push_back(in_place ? x[row].data() : out[row].data());
  }
  centre(from.data(), shift.data(), D, to.data(), sum.data(), square.data());
  for (int64_t i = 0; i < D; ++i) {
    Real expected_sum = 1, expected_square = 2, size = 0;
    for (int row = 0; row < count; ++row) {
      const float centred = before[row][i] - shift[i];
      expect_near(to[row][i], centred, 0, "centred", D);
      expected_sum += centred;
      expected_square += Real(centred) * centred;
      size += std::abs(centred);
    }
    expect_near(sum[i], expected_sum, 1e-6L * size, "sum", D);
    expect_near(square[i], expected_square, 1e-6L * expected_square, "square", D);
  }
}

void check_add(const CorrelationKernels& kernels, int64_t D, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> tile(D);
  std::vector<double> total(D);
  for (int64_t i = 0; i < D; ++i) {
    tile[i] = normal(random);
    total[i] = 1e6 * normal(random);
  }
  const std::vector<double> before = total;
  kernels.add_to_double(tile.data(), D, total.data());
  for (int64_t i = 0; i < D; ++i) expect_near(total[i], before[i] + tile[i], 0, "total", D);
}

}  // namespace

int main() {
  std::mt19937 random(0);
  std::vector<int64_t> widths = {255, 256, 257, 1001};
  for (int64_t D = 1; D <= 33; ++D) widths.push_back(D);
  for (modxfer::Isa isa : modxfer::kIsas) {
    if (!modxfer::has_isa(isa)) continue;
    modxfer::isa_in_use() = isa;
    const CorrelationKernels& kernels = modxfer::correlation_kernels();
    int rows = 0;
    for (int64_t D : widths) {
      for (bool in_place : {false, true}) {
        check_rows(kernels.centre_group, modxfer::kCorrelationGroup, D, in_place, random);
        check_rows(kernels.centre_row, 1, D, in_place, random);
        rows += modxfer::kCorrelationGroup + 1;
      }
      check_add(kernels, D, random);
      ++rows;
    }
    std::printf("%s: %d rows\n", kernels.isa, rows);
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
