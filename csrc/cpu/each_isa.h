// The row kernels of MODXFER_ROWS, compiled once per instruction set with vectors as wide as its
// registers, and the choice among them.
//
// Included inside namespace modxfer, after modxfer/isa.h; no include guard and no includes of its
// own outside a set's namespace. MODXFER_ROWS ends with kKernels, what a room calls. With
// MODXFER_ROUNDS_PRODUCTS no product goes unrounded into a fused addition.

#if defined(MODXFER_ROUNDS_PRODUCTS) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace baseline {
constexpr const char* kIsaName = "baseline";
#define MODXFER_VECTOR_BYTES 16
#include "modxfer/vec.h"
#include MODXFER_ROWS
#undef MODXFER_VECTOR_BYTES
}  // namespace baseline

#ifdef MODXFER_X86_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr const char* kIsaName = "avx2";
#define MODXFER_VECTOR_BYTES 32
#include "modxfer/vec.h"
#include MODXFER_ROWS
#undef MODXFER_VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
namespace avx512 {
constexpr const char* kIsaName = "avx512";
#define MODXFER_VECTOR_BYTES 64
#include "modxfer/vec.h"
#include MODXFER_ROWS
#undef MODXFER_VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options
#endif

// Those of isa_in_use().
static const auto& kernels_in_use() {
#ifdef MODXFER_X86_TARGETS
  switch (isa_in_use().load(std::memory_order_relaxed)) {
    case Isa::kAvx512:
      return avx512::kKernels;
    case Isa::kAvx2:
      return avx2::kKernels;
    default:
      break;
  }
#endif
  return baseline::kKernels;
}
