// The K largest logits of a row and the mass of the rest: the kernels' signatures. Torch-free.
#pragma once

#include <cstdint>

namespace modxfer {

// Row kernels of one instruction set.
struct TopKKernels {
  const char* isa;
  int lanes;  // of a vector
  // The maxima of groups of `vectors` vectors of logits, a lane each; returns how many they are.
  int64_t (*maxima)(const float* logits, int64_t V, int64_t vectors, float* maxima);
  // Writes the indices of logits that are `bound` or more, and returns how many they are; rest is
  // the sum of e^(rate' (z - top)) over the others, rate = rate' log2(e).
  int64_t (*collect)(const float* logits, const float* z, int64_t V, float bound, float top,
                     float rate, int32_t* indices, double& rest);
};

// Those for the instruction set in use.
const TopKKernels& topk_kernels();

}  // namespace modxfer
