// Sums of products as one: what the kernel of csrc/cuda/hopper is given, and the order of its
// steps. Torch-free, and free of CUDA and CUTLASS.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MODXFER_ANYWHERE __host__ __device__ __forceinline__
#else
#define MODXFER_ANYWHERE inline
#endif

namespace modxfer::cuda {

// Of q, k and v with their LoRA parts.
constexpr int kMostPairs = 6;
// Columns of a step, and what must divide sizes and strides: 16 bytes of half precision.
constexpr int kStepTerms = 64, kAligned = 8;

// Rows are `stride` elements apart, elements of a row side by side.
struct Operand {
  const void* data;
  int64_t stride;
};

struct Pair {
  Operand left;   // [rows, terms]
  Operand right;  // [columns, terms], or [terms, columns]
  int terms;
};

// result = sum over pairs of left times right, + addend + bias, rounded once.
struct LoraProduct {
  int rows, columns, num_pairs;
  Pair pairs[kMostPairs];
  Operand addend;    // [rows, columns], may be the result itself; no data: none
  const void* bias;  // [columns], or nullptr
  Operand result;    // [rows, columns]
  int multiprocessors;
};

// Steps of a sum; what the last one has no terms for is zero in both factors.
MODXFER_ANYWHERE int steps_of(int terms) { return (terms + kStepTerms - 1) / kStepTerms; }

template <class Pairs>
MODXFER_ANYWHERE int num_steps(const Pairs* pairs, int num_pairs) {
  int steps = 0;
  for (int i = 0; i < num_pairs; ++i) steps += steps_of(pairs[i].terms);
  return steps;
}

// The steps of all pairs go through one ring of buffers, each pair's behind those before it:
// load(pair, steps, state), `state` being where in the ring, and in which round of it, they begin.
template <class Pairs, class State, class Load>
MODXFER_ANYWHERE void load_in_order(const Pairs* pairs, int num_pairs, State state,
                                    const Load& load) {
  for (int i = 0; i < num_pairs; ++i) {
    const int steps = steps_of(pairs[i].terms);
    load(pairs[i], steps, state);
    state.advance(steps);
  }
}

}  // namespace modxfer::cuda
