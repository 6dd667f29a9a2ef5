// Cross entropy of one row of logits: its sums and the kernels' signatures. Torch-free.
#pragma once

#include <cstdint>

namespace modxfer {

// Sums over the classes of a row, x = z - max.
struct CeSums {
  float max;
  double d;        // sum e^x
  double x_sum;    // sum x, where more is asked for
  double e_x_sum;  // sum e^x x, where more is asked for
};

// Row kernels of one instruction set.
struct CeRowKernels {
  const char* isa;
  // By [keeps][more]: whether e^x goes to `kept` [V], which may be the row itself, and whether the
  // sums with x are made.
  CeSums (*sums[2][2])(const float* logits, int64_t V, float* kept);
  // kept = kept * scale - shift
  void (*scale)(float* kept, int64_t V, float scale, float shift);
};

// The kernels for the instruction set in use.
const CeRowKernels& ce_row_kernels();

}  // namespace modxfer
