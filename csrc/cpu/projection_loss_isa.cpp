// The projection loss row kernel, compiled for each instruction set and chosen when the library is
// loaded.

#include "modxfer/projection_loss.h"

#if defined(__x86_64__) && !defined(__clang__)
#define MODXFER_X86_TARGETS 1
#endif

// z * s - t * s of two equal rows is 0 only if neither product stays unrounded in a fused multiply
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace modxfer {

namespace baseline {
#include "modxfer/vec.h"
#include "projection_loss_rows.h"
}  // namespace baseline

#ifdef MODXFER_X86_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "modxfer/vec.h"
#include "projection_loss_rows.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#include "modxfer/vec.h"
#include "projection_loss_rows.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

const ProjectionRowKernel& projection_row_kernel() {
  static const ProjectionRowKernel kernel = [] {
#ifdef MODXFER_X86_TARGETS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return ProjectionRowKernel{"avx512", avx512::projection_row};
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return ProjectionRowKernel{"avx2", avx2::projection_row};
    }
#endif
    return ProjectionRowKernel{"baseline", baseline::projection_row};
  }();
  return kernel;
}

}  // namespace modxfer
