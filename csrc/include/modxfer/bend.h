// What becomes of the products of a head: raw = product + bias, z = cap tanh(scale raw / cap).
// Torch-free.
#pragma once

#include <cstdint>

namespace modxfer {

struct Bend {
  float scale = 1.0f;
  float cap = 0.0f;             // 0: none, z = scale raw
  const float* bias = nullptr;  // of each class, or none

  constexpr bool is_straight() const { return scale == 1.0f && cap == 0.0f; }
  constexpr bool is_identity() const { return is_straight() && bias == nullptr; }
};

// Row kernels of one instruction set.
struct BendRowKernels {
  const char* isa;
  // z from products of the head; an infinite logit stays what it is. z may be x itself.
  void (*bend)(const float* x, int64_t V, const Bend& bend, float* z);
  // Turns a gradient in z into one in the raw logits.
  void (*unbend)(const float* z, int64_t V, const Bend& bend, float* gradient);
};

// Those for the instruction set in use.
const BendRowKernels& bend_row_kernels();

}  // namespace modxfer
