// Rows of features less a shift, with their sums, and the addition of a tile to double. Included
// once per instruction set, in its namespace; the compiler finds the vectors.

template <int kCount>
MODXFER_INLINE void centre_rows(const float* const* x, const float* shift, int64_t D,
                                float* const* out, double* sum, double* square) {
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

void centre_group(const float* const* x, const float* shift, int64_t D, float* const* out,
                  double* sum, double* square) {
  centre_rows<kCorrelationGroup>(x, shift, D, out, sum, square);
}

void centre_row(const float* const* x, const float* shift, int64_t D, float* const* out,
                double* sum, double* square) {
  centre_rows<1>(x, shift, D, out, sum, square);
}

void add_to_double(const float* tile, int64_t n, double* total) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) total[i] += tile[i];
}

constexpr CorrelationKernels kKernels{kIsaName, centre_group, centre_row, add_to_double};
