// The sums of a softmax and what belongs to it, found as its classes come: by a thread, then by its
// block and cluster. Relative to the largest logit so far.
#pragma once

#include "rows.cuh"

namespace modxfer::cuda {

struct Softmax {
  float top = kNoTop;
  float d = 0.0f;        // sum e^(x / temperature), x = z - top
  float d_1 = 0.0f;      // sum e^x, where it is needed
  float x_sum = 0.0f;    // sum x, where it is
  float e_x_sum = 0.0f;  // sum e^(x / temperature) x, where it is
  float count = 0.0f;    // of classes
  float z_label = 0.0f;  // of the label, if it is one of them

  // To a top that is not smaller. rate: log2(e) / temperature.
  MODXFER_DEVICE void raise(float higher, float rate) {
    if (!(higher > top)) return;
    const float less = top - higher;
    const float factor = device::exp2_approx(less * rate);
    e_x_sum = factor == 0.0f ? 0.0f : factor * (e_x_sum + less * d);
    d *= factor;
    d_1 *= device::exp2_approx(less * kLog2E);
    if (count > 0.0f) x_sum += less * count;
    top = higher;
  }

  // Of four classes those whose bit is set.
  MODXFER_DEVICE void add(const Four& z, uint32_t mask, float rate, bool needs_d_1, bool needs_x) {
    float higher = kNoTop;
    MODXFER_UNROLL
    for (int k = 0; k < 4; ++k) higher = mask >> k & 1 ? vmax(z.of[k], higher) : higher;
    raise(higher, rate);
    MODXFER_UNROLL
    for (int k = 0; k < 4; ++k) {
      if ((mask >> k & 1) == 0) continue;
      const float x = z.of[k] - top, e = device::exp2_approx(x * rate);
      d += e;
      if (needs_d_1) d_1 += device::exp2_approx(x * kLog2E);
      if (needs_x) {
        x_sum += x;
        e_x_sum += e == 0.0f ? 0.0f : e * x;
      }
      count += 1.0f;
    }
  }

  MODXFER_DEVICE void add(Softmax other, float rate) {
    raise(other.top, rate);
    other.raise(top, rate);
    d += other.d;
    d_1 += other.d_1;
    x_sum += other.x_sum;
    e_x_sum += other.e_x_sum;
    count += other.count;
    z_label += other.z_label;
  }
};

constexpr int kSoftmax = sizeof(Softmax) / sizeof(float);

// Of a block's shared memory: what its warps, and the blocks of the cluster, tell one another about
// kParts of a row. Of every second row apart: some blocks may read what they were told while others
// are at the next row.
template <int kParts>
struct alignas(16) SoftmaxRoom {
  float warps[kMaxWarps * kParts * kSoftmax];
  Softmax blocks[2][kMaxBlocks][kParts];
};

// From what each thread knows of the parts to what is true of the row, with the same bits in all.
template <int kParts>
MODXFER_DEVICE void reduce_row(Softmax (&parts)[kParts], float rate, int turn,
                               SoftmaxRoom<kParts>& room) {
  float tops[kParts];
  MODXFER_UNROLL
  for (int i = 0; i < kParts; ++i) tops[i] = parts[i].top;
  reduce_block<true, kParts>(tops, room.warps);
  MODXFER_UNROLL
  for (int i = 0; i < kParts; ++i) parts[i].raise(tops[i], rate);
  reduce_block<false, kParts * kSoftmax>(&parts[0].top, room.warps);
  MODXFER_UNROLL
  for (int i = 0; i < kParts; ++i) parts[i].top = tops[i];
  auto* blocks = room.blocks[turn & 1];
  exchange<kParts * kSoftmax>(&parts[0].top, &blocks[0][0].top);
  MODXFER_UNROLL
  for (int i = 0; i < kParts; ++i) {
    parts[i] = {};
    for (int rank = 0; rank < device::cluster_size(); ++rank) parts[i].add(blocks[rank][i], rate);
  }
}

}  // namespace modxfer::cuda
