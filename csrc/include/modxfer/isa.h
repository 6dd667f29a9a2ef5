// The instruction sets that the CPU kernels are compiled for, and the one in use. Torch-free.
#pragma once

#include <atomic>

#if defined(__x86_64__) && !defined(__clang__)
#define MODXFER_X86_TARGETS 1
#include <immintrin.h>
#endif

namespace modxfer {

// Narrowest first; kernels/common/instruction_sets.py names them in this order.
enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

// Whether this processor has it. The baseline is what the compiler takes when nothing is asked.
inline bool has_isa(Isa isa) {
#ifdef MODXFER_X86_TARGETS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBaseline;
}

// The widest that this processor has, until another is stored; only while no kernel runs.
inline std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> in_use = [] {
    Isa widest = Isa::kBaseline;
    for (Isa isa : kIsas) widest = has_isa(isa) ? isa : widest;
    return widest;
  }();
  return in_use;
}

}  // namespace modxfer
