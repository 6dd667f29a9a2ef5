// Rows of features less a shift, with their sums, and the addition of a tile to double. Torch-free.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
// compiled three times, and chosen when the library is loaded; a sanitizer is not ready by then
#define MODXFER_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MODXFER_CLONES
#endif

// The same bits for every instruction set, and in the rest of a vectorised loop.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace modxfer {

// Rows that are summed in float before they are added to double.
constexpr int kGroup = 8;

template <int kCount>
static inline __attribute__((always_inline)) void centre_rows(const float* const* x,
                                                              const float* shift, int64_t D,
                                                              float* const* out, double* sum,
                                                              double* square) {
#pragma GCC ivdep  // out may be x, and then at the same index
  for (int64_t i = 0; i < D; ++i) {
    float s = 0.0f, q = 0.0f;
    for (int row = 0; row < kCount; ++row) {
      const float centred = x[row][i] - shift[i];
      out[row][i] = centred;
      s += centred;
      q += centred * centred;
    }
    sum[i] += s;
    square[i] += q;
  }
}

// kGroup rows of D columns: out = x - shift; sum and square += what they say, over the rows.
MODXFER_CLONES static void centre_group(const float* const* x, const float* shift, int64_t D,
                                        float* const* out, double* sum, double* square) {
  centre_rows<kGroup>(x, shift, D, out, sum, square);
}

MODXFER_CLONES static void centre_row(const float* const* x, const float* shift, int64_t D,
                                      float* const* out, double* sum, double* square) {
  centre_rows<1>(x, shift, D, out, sum, square);
}

// total += tile, n values.
MODXFER_CLONES static void add_to_double(const float* tile, int64_t n, double* total) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) total[i] += tile[i];
}

}  // namespace modxfer
