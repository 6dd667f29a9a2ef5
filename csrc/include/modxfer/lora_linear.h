// Blocks of rows of a LoRA linear: layouts and the kernels' signatures. Torch-free.
//
// M rows   K, N widths   R rank
//
// Panels: a matrix [R, W] as [ceil(W / L)][R][L] floats, zero past W, for vectors of L lanes: the
// values that a kernel uses together lie together, whatever W is.
#pragma once

#include <cstdint>

namespace modxfer {

// Rows of floats, `stride` apart.
struct Matrix {
  const float* data;
  int64_t stride;
};

// Bit k % 32 of word k / 32 of a row: 1 where element k is kept. No words: everything is kept.
struct Mask {
  const uint32_t* words;
  int64_t stride;
};

// What decides a mask; kernels/lora_linear/dropout.py defines the stream.
struct DropoutKey {
  uint64_t seed;
  uint32_t target;
  uint32_t threshold;  // 1 to 65536: a half-word below it is dropped
};

// Kernels of one instruction set, each for a few tens of rows.
struct LoraKernels {
  const char* isa;
  int64_t lanes;
  // words [rows, stride], of which `num_words` are written in each row
  void (*draw_mask)(const DropoutKey& key, int64_t first_row, int64_t rows, int64_t num_words,
                    uint32_t* words, int64_t stride);
  // s [rows, R] = scale mask(x) A^T, with A [R, K] in panels
  void (*shrink)(Matrix x, Mask mask, int64_t rows, int64_t K, const float* a_panels, int64_t R,
                 float scale, float* s, int64_t s_stride);
  // y [rows, W] = init + mask(s P), with P [R, W] in panels; init may be y, or null for zeros
  void (*expand)(Matrix s, int64_t rows, int64_t R, const float* panels, int64_t W, Mask mask,
                 Matrix init, float* y, int64_t y_stride);
  // grad [R, W] = s^T mask(x), or += that; grad in panels
  void (*outer)(Matrix s, Matrix x, Mask mask, int64_t rows, int64_t R, int64_t W, bool accumulate,
                float* grad);
};

// The kernels of the instruction set in use.
const LoraKernels& lora_kernels();

}  // namespace modxfer
