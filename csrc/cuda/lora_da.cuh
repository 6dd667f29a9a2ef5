// dA = ds^T (m x) of all targets, in one pass over x. Torch-free; notation of
// kernels/lora_linear/op.py.
//
// A block has 256 columns and a share of the rows of x, a warp 64 of the columns and one slot,
// ranks of one target. Where slots are few, two parts of the warps take turns at the rows. Masks
// are read as they were stored. A share of rows leaves a partial sum, which lora_reduce.cuh adds
// in order.
//
// Bytes: x once, M K b; of the masks M K / 8 a target with dropout; ds M R once for each 256
// columns, from L2; partial sums of dA K R 4 for each share of rows.
#pragma once

#include "lora_backward.cuh"
#include "lora_shrink.cuh"

namespace modxfer::cuda {

template <class W>
struct DaSlot {
  Strided<W> ds;          // [M, ranks]
  Strided<uint8_t> mask;  // [M, 4 ceil(K / 32)] bytes, or no data
  float* da;              // [shares of M, R, K], from the first of its ranks on
  int64_t share_stride;   // R K
};

template <class X, class W>
struct Da {
  Strided<X> x;
  int share_rows;  // of a block, a multiple of kBackwardRows<X>
  int num_slots, slots_at_once;
  int parts;  // of the rows of a stage, by turns: 1 or 2
  DaSlot<W> slots[kMaxSlots];
};

// At most, as the registers allow: 128 of them are a slot.
template <class W, int kTiles>
constexpr int kDaThreads = kTiles > 2       ? 256
                           : sizeof(W) == 4 ? 384
                                            : 512;

constexpr int kMaskBytes = kBackwardColumns / 8;  // of a row of a stage

template <class X, class W, int kTiles>
constexpr int kDaSlotBytes = kBackwardRows<X> * (kFewBytes<W, 8 * kTiles> + kMaskBytes);

template <class X, class W, int kTiles>
MODXFER_BOTH int da_stage_bytes(int slots) {
  return kBackwardStageBytes + slots * kDaSlotBytes<X, W, kTiles>;
}

template <class X, class W, int kTiles>
MODXFER_KERNEL void MODXFER_BOUNDS((kDaThreads<W, kTiles>), 1)
    lora_da(MODXFER_ARGUMENT Da<X, W> of) {
  constexpr int kRows = kBackwardRows<X>, kRanks = 8 * kTiles;
  constexpr int kSlotBytes = kDaSlotBytes<X, W, kTiles>, kFew = kFewBytes<W, kRanks>;
  const int M = of.x.rows, K = of.x.columns;
  const int groups = (of.num_slots + of.slots_at_once - 1) / of.slots_at_once;
  const int tiles = (K + kBackwardColumns - 1) / kBackwardColumns;
  const int block = device::cluster_index();
  const int first_slot = block % groups * of.slots_at_once;
  const int first_column = block / groups % tiles * kBackwardColumns;
  const int share = block / groups / tiles;
  const int64_t first_row = static_cast<int64_t>(share) * of.share_rows;
  const int rows = M - first_row < of.share_rows ? static_cast<int>(M - first_row) : of.share_rows;
  const int others = of.num_slots - first_slot;
  const int slots = others < of.slots_at_once ? others : of.slots_at_once;

  const int warp = device::thread_index() / 32, strip = warp % kStrips;
  const int own = warp / kStrips % of.slots_at_once, part = warp / kStrips / of.slots_at_once;
  const int group = device::thread_index() % 32 / 4;
  const DaSlot<W>& slot = of.slots[first_slot + (own < slots ? own : 0)];
  const bool works = own < slots && first_column + strip * kStrip < K;

  const auto load = [&](int step, unsigned char* stage) {
    const int row = static_cast<int>(first_row) + step * kRows;
    copy_tile<X, kBackwardColumns>(stage, kRows, of.x, row, first_column);
    for (int i = 0; i < slots; ++i) {
      const DaSlot<W>& from = of.slots[first_slot + i];
      unsigned char* few = stage + kBackwardStageBytes + i * kSlotBytes;
      copy_few<W, kRanks>(few, kRows, from.ds, row, 0);
      if (from.mask.data == nullptr) continue;
      for_each_chunk<kMaskBytes / kChunkBytes>(kRows, [&](int m, int chunk) {
        copy_chunk(few + kRows * kFew + m * kMaskBytes + chunk * kChunkBytes, from.mask, row + m,
                   first_column / 8 + chunk * kChunkBytes);
      });
    }
  };

  StripSums<kTiles> da;
  const auto use = [&](int step, const unsigned char* stage) {
    if (!works) return;
    const unsigned char* few = stage + kBackwardStageBytes + own * kSlotBytes;
    const unsigned char* mask = few + kRows * kFew + strip * (kStrip / 8) + group;
    for (int row = 16 * part; row < kRows; row += 16 * of.parts) {
      da.template add<X, W>(stage, few, strip, row, [&](Eight<X>& x, int m) {
        if (slot.mask.data != nullptr) keep(x, kept_of_byte(mask[m * kMaskBytes]));
      });
    }
  };

  for_each_stage(device::shared_memory(), da_stage_bytes<X, W, kTiles>(of.slots_at_once),
                 (rows + kRows - 1) / kRows, load, use);
  if (of.parts > 1) add_parts(da.of, device::shared_memory(), part, of.parts);
  if (part > 0 || !works) return;
  da.for_each([&](int column, int rank, float sum) {
    const int k = first_column + strip * kStrip + column;
    if (k >= K || rank >= slot.ds.columns) return;
    slot.da[share * slot.share_stride + static_cast<int64_t>(rank) * K + k] = sum;
  });
}

}  // namespace modxfer::cuda
