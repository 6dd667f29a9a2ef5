// s = scale (m x) A^T and the masks m of all targets that share x, in one pass over x. Torch-free;
// notation of kernels/lora_linear/op.py.
//
// M rows   K columns of x   R ranks   T targets
//
// A block has a few tens of rows and all of K, a stage of 256 bytes a row after another. A warp has
// 16 of the rows and one slot, ranks of one target; several parts of the warps take turns at the
// columns where slots are few, and are added in order at the end. A lane draws the mask of the
// eight columns that it has of a row: neither the draws nor m x leave its registers.
//
// Bytes: x once, M K b; of the masks M K / 8 a target with dropout; A once a block, from L2.
#pragma once

#include "lora_dropout.cuh"
#include "stages.cuh"

namespace modxfer::cuda {

constexpr int kMaxSlots = 16, kShrinkThreads = 512;
constexpr int kShrinkBytes = 256;  // of a row in a stage

template <class X>
constexpr int kShrinkColumns = kShrinkBytes / sizeof(X);

template <class W>
struct ShrinkSlot {
  Strided<W> a;  // [ranks, K], of lora_a
  int column;    // of s, where its ranks begin
  float scale;
  uint32_t target;     // in bits, and in the counter of the draws
  uint32_t threshold;  // 0: everything is kept
  bool stores_bits;    // the first slot of a target does
};

template <class X, class W>
struct Shrink {
  Strided<X> x;
  const uint64_t* seed;  // or nullptr
  uint32_t* bits;        // [T, M, ceil(K / 32)], or nullptr
  W* s;                  // [M, sum R]
  int sum_ranks;
  int tile_rows;  // of a block, a multiple of 16
  int parts;      // of the columns of a stage, by turns: 1, 2 or 4
  int num_slots, slots_at_once;
  ShrinkSlot<W> slots[kMaxSlots];
};

template <class X, class W, int kTiles>
MODXFER_BOTH int shrink_stage_bytes(int tile_rows, int slots) {
  return tile_rows * kShrinkBytes +
         slots * 8 * kTiles * kShrinkColumns<X> * static_cast<int>(sizeof(W));
}

template <class X, class W, int kTiles>
MODXFER_KERNEL void MODXFER_BOUNDS(kShrinkThreads, 1)
    lora_shrink(MODXFER_ARGUMENT Shrink<X, W> of) {
  constexpr int kColumns = kShrinkColumns<X>, kWords = kColumns / 32, kRanks = 8 * kTiles;
  constexpr int kSlotBytes = kRanks * kColumns * static_cast<int>(sizeof(W));
  const int groups = (of.num_slots + of.slots_at_once - 1) / of.slots_at_once;
  const int first_slot = device::cluster_index() % groups * of.slots_at_once;
  const int first_row = device::cluster_index() / groups * of.tile_rows;
  const int others = of.num_slots - first_slot;
  const int slots = others < of.slots_at_once ? others : of.slots_at_once;

  const int warp = device::thread_index() / 32, row_tiles = of.tile_rows / 16;
  const int group = device::thread_index() % 32 / 4, place = device::thread_index() % 4;
  const int row = warp % row_tiles * 16 + group;  // in the block; the other is 8 below it
  const int own = warp / row_tiles % of.slots_at_once;
  const int part = warp / row_tiles / of.slots_at_once;
  const ShrinkSlot<W>& slot = of.slots[first_slot + (own < slots ? own : 0)];
  const uint64_t seed = of.bits == nullptr ? 0 : *of.seed;
  const RoundKeys keys = round_keys(seed);
  const int num_words = (of.x.columns + 31) / 32;

  const auto load = [&](int step, unsigned char* stage) {
    copy_tile<X, kColumns>(stage, of.tile_rows, of.x, first_row, step * kColumns);
    unsigned char* a = stage + of.tile_rows * kShrinkBytes;
    for (int i = 0; i < slots; ++i) {
      copy_tile<W, kColumns>(a + i * kSlotBytes, kRanks, of.slots[first_slot + i].a, 0,
                             step * kColumns);
    }
  };

  const bool stores = of.bits != nullptr && slot.stores_bits;
  const int64_t mask_row = static_cast<int64_t>(slot.target) * of.x.rows + first_row + row;
  uint32_t* const words = stores ? of.bits + mask_row * num_words : nullptr;

  float sums[kTiles][4] = {};
  const auto use = [&](int step, const unsigned char* stage) {
    const unsigned char* a = stage + of.tile_rows * kShrinkBytes + own * kSlotBytes;
    MODXFER_UNROLL
    for (int i = 0; i < kWords; ++i) {
      const int word = step * kWords + i;
      if (own >= slots || (i & (of.parts - 1)) != part || word >= num_words) continue;
      ColumnDraws columns;
      if (slot.threshold > 0) columns = column_draws(keys, slot.target, 4 * word + place);
      Eight<X> rows[2];
      MODXFER_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int m = first_row + row + 8 * h;
        rows[h] = read_eight<X>(stage, of.tile_rows, row + 8 * h, 4 * i + place);
        uint32_t byte = 0xFF;
        if (slot.threshold > 0) {
          const uint32_t row_word = static_cast<uint32_t>(m) ^ static_cast<uint32_t>(seed);
          const Kept kept = kept_of(draws_of(keys, columns, row_word), slot.threshold);
          keep(rows[h], kept);
          byte = byte_of(kept);
        }
        if (stores) {
          const uint32_t bits = word_of(byte);
          if (place == 0 && m < of.x.rows) words[8 * h * num_words + word] = bits;
        }
      }
      const Left<X, W> left[2] = {left_of_rows<W>(rows[0], rows[1], 0),
                                  left_of_rows<W>(rows[0], rows[1], 1)};
      MODXFER_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        const Eight<W> weights = read_eight<W>(a, kRanks, 8 * tile + group, 4 * i + place);
        MODXFER_UNROLL
        for (int h = 0; h < 2; ++h) multiply(sums[tile], left[h], right_of_row(weights, h));
      }
    }
  };

  unsigned char* shared = device::shared_memory();
  const int steps = (of.x.columns + kColumns - 1) / kColumns;
  const int bytes = shrink_stage_bytes<X, W, kTiles>(of.tile_rows, of.slots_at_once);
  for_each_stage(shared, bytes, steps, load, use);
  if (of.parts > 1) add_parts(sums, shared, part, of.parts);
  if (part > 0 || own >= slots) return;
  MODXFER_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    MODXFER_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int m = first_row + row + 8 * (i / 2), r = 8 * tile + 2 * place + i % 2;
      if (m >= of.x.rows || r >= slot.a.rows) continue;
      const int64_t at = static_cast<int64_t>(m) * of.sum_ranks + slot.column + r;
      of.s[at] = rounded<W>(slot.scale * sums[tile][i]);
    }
  }
}

}  // namespace modxfer::cuda
