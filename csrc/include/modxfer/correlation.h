// Sums and products of rows of features: the kernels' signatures. Torch-free.
#pragma once

#include <cstdint>

namespace modxfer {

// Rows that are summed in float before they are added to double.
constexpr int kCorrelationGroup = 8;

// Kernels of one instruction set; all of them give the same bits.
struct CorrelationKernels {
  const char* isa;
  // kCorrelationGroup rows of D columns: out = x - shift; sum and square += what they say, over the
  // rows. A row of out may be the row of x.
  void (*centre_group)(const float* const* x, const float* shift, int64_t D, float* const* out,
                       double* sum, double* square);
  // The same of one row.
  void (*centre_row)(const float* const* x, const float* shift, int64_t D, float* const* out,
                     double* sum, double* square);
  // total += tile, n values.
  void (*add_to_double)(const float* tile, int64_t n, double* total);
};

// The kernels of the instruction set in use.
const CorrelationKernels& correlation_kernels();

}  // namespace modxfer
