// What a model does to its logits behind the head, z = cap tanh(scale raw / cap). Torch-free.
#pragma once

#include <cstdint>

namespace modxfer {

struct Bend {
  float scale = 1.0f;
  float cap = 0.0f;  // 0: none, z = scale raw

  constexpr bool is_identity() const { return scale == 1.0f && cap == 0.0f; }
};

// Row kernels of one instruction set.
struct BendRowKernels {
  const char* isa;
  // z from raw logits; an infinite one stays what it is. z may be raw itself.
  void (*bend)(const float* raw, int64_t V, const Bend& bend, float* z);
  // Turns a gradient in z into one in the raw logits.
  void (*unbend)(const float* z, int64_t V, const Bend& bend, float* gradient);
};

// Those for the instruction set in use.
const BendRowKernels& bend_row_kernels();

}  // namespace modxfer
