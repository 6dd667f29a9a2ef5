// The KD row kernels, compiled for each instruction set and chosen when the library is loaded.

#include "modxfer/kd_loss.h"

#if defined(__x86_64__) && !defined(__clang__)
#define MODXFER_X86_TARGETS 1
#endif

namespace modxfer {

namespace baseline {
#include "modxfer/vec.h"
#include "kd_loss_rows.h"
}  // namespace baseline

#ifdef MODXFER_X86_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "modxfer/vec.h"
#include "kd_loss_rows.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#include "modxfer/vec.h"
#include "kd_loss_rows.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

const KdRowKernels& kd_row_kernels() {
  static const KdRowKernels kernels = [] {
#ifdef MODXFER_X86_TARGETS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return KdRowKernels{"avx512", avx512::row_fwd, avx512::row_recompute, avx512::row_grad};
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return KdRowKernels{"avx2", avx2::row_fwd, avx2::row_recompute, avx2::row_grad};
    }
#endif
    return KdRowKernels{"baseline", baseline::row_fwd, baseline::row_recompute, baseline::row_grad};
  }();
  return kernels;
}

}  // namespace modxfer
