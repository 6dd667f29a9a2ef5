// The kernels of a LoRA linear, compiled for each instruction set and chosen when the library is
// loaded.

#include "modxfer/lora_linear.h"

#if defined(__x86_64__) && !defined(__clang__)
#define MODXFER_X86_TARGETS 1
#include <immintrin.h>
#endif

namespace modxfer {

namespace baseline {
#undef MODXFER_VECTOR_BYTES
#define MODXFER_VECTOR_BYTES 16
#include "modxfer/vec.h"
#include "lora_linear_rows.h"
}  // namespace baseline

#ifdef MODXFER_X86_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#undef MODXFER_VECTOR_BYTES
#define MODXFER_VECTOR_BYTES 32
#include "modxfer/vec.h"
#include "lora_linear_rows.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#undef MODXFER_VECTOR_BYTES
#define MODXFER_VECTOR_BYTES 64
#include "modxfer/vec.h"
#include "lora_linear_rows.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

const LoraKernels& lora_kernels() {
  static const LoraKernels kernels = [] {
#ifdef MODXFER_X86_TARGETS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return LoraKernels{"avx512",       avx512::kLanes, avx512::draw_mask,
                         avx512::shrink, avx512::expand, avx512::outer};
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return LoraKernels{"avx2",       avx2::kLanes, avx2::draw_mask,
                         avx2::shrink, avx2::expand, avx2::outer};
    }
#endif
    return LoraKernels{"baseline",       baseline::kLanes, baseline::draw_mask,
                       baseline::shrink, baseline::expand, baseline::outer};
  }();
  return kernels;
}

}  // namespace modxfer
