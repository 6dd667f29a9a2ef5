// ds = scale dy B and dB = dy^T s of each target, in one pass over each dy. Torch-free; notation of
// kernels/lora_linear/op.py.
//
// A block has 256 columns and a share of the rows of one dy, and at most 64 ranks. Its part of B
// stays in shared memory; stages of rows of dy and s go past. Of a stage a warp sums over columns
// for 16 rows, ds, and over half of the rows for 64 columns, dB. Both leave as partial sums: ds one
// for each 256 columns, dB one for each share of rows, which lora_reduce.cuh adds in order.
//
// Bytes: dy once, M N b; partial sums of ds M R 4 for each 256 columns, an eighth of dy at rank 16
// in half precision; of dB N R 4 for each share of rows.
#pragma once

#include "lora_backward.cuh"

namespace modxfer::cuda {

constexpr int kMaxTargets = 8;
constexpr int kDsDbParts = 2, kDsDbThreads = 32 * kStrips * kDsDbParts;

template <class X, class W>
struct DsDbTarget {
  Strided<X> dy;    // [M, N]
  Strided<W> b;     // [N, R]
  Strided<W> s;     // [M, R]
  float* ds;        // [tiles of N, M, R], or nullptr
  float* db;        // [shares of M, N, R], or nullptr; then s is not read
  float scale;      // of ds
  int first_block;  // blocks of tiles of N, of ranks, and of rows
};

template <class X, class W>
struct DsDb {
  int rows, share_rows;  // of a block, a multiple of kBackwardRows<X>
  int num_targets;
  DsDbTarget<X, W> targets[kMaxTargets];
};

// Of B, and of a stage.
template <class W, int kTiles>
constexpr int kDsDbOwnBytes = 8 * kTiles * kBackwardColumns * static_cast<int>(sizeof(W));
template <class X, class W, int kTiles>
constexpr int kDsDbStageBytes = kBackwardStageBytes + kBackwardRows<X> * kFewBytes<W, 8 * kTiles>;

// tile [ranks, columns] = B^T of a block, zeros past it.
template <class W, int kRanks>
MODXFER_DEVICE void transpose_b(unsigned char* tile, const Strided<W>& b, int first_column,
                                int first_rank) {
  for (int i = device::thread_index(); i < kRanks * kBackwardColumns; i += device::block_size()) {
    const int column = i / kRanks, rank = i % kRanks;
    const int n = first_column + column, r = first_rank + rank;
    Chunk<W> value = {};
    if (n < b.rows && r < b.columns) value.of[0] = b.data[n * b.row_stride + r * b.column_stride];
    auto* chunk = reinterpret_cast<W*>(tile + place_of<W>(kRanks, rank, column / kChunk<W>));
    chunk[column % kChunk<W>] = value.of[0];
  }
}

template <class X, class W, int kTiles>
MODXFER_KERNEL void MODXFER_BOUNDS(kDsDbThreads, kTiles == 2 ? 2 : 1)
    lora_ds_db(MODXFER_ARGUMENT DsDb<X, W> of) {
  constexpr int kRows = kBackwardRows<X>, kRanks = 8 * kTiles, kRowTiles = kRows / 16;
  // ds of a stage is [kRowTiles of 16 rows, kTiles of 8 ranks]: so many warps have the same row
  // tile, each of them kOwn rank tiles of it; those that are left have no part of ds
  constexpr int kWarps = kDsDbThreads / 32, kMostSharing = kWarps / kRowTiles;
  constexpr int kSharing = kMostSharing < kTiles ? kMostSharing : kTiles, kOwn = kTiles / kSharing;
  int index = 0;
  while (index + 1 < of.num_targets &&
         device::cluster_index() >= of.targets[index + 1].first_block) {
    ++index;
  }
  const DsDbTarget<X, W>& target = of.targets[index];
  const int N = target.b.rows, R = target.b.columns;
  const int tiles = (N + kBackwardColumns - 1) / kBackwardColumns;
  const int rank_blocks = (R + kRanks - 1) / kRanks;
  const int block = device::cluster_index() - target.first_block;
  const int tile = block % tiles, share = block / tiles / rank_blocks;
  const int first_column = tile * kBackwardColumns;
  const int first_rank = block / tiles % rank_blocks * kRanks;
  const int64_t first_row = static_cast<int64_t>(share) * of.share_rows;
  const int rows =
      of.rows - first_row < of.share_rows ? static_cast<int>(of.rows - first_row) : of.share_rows;
  const int columns = N - first_column < kBackwardColumns ? N - first_column : kBackwardColumns;

  const int warp = device::thread_index() / 32, strip = warp % kStrips, part = warp / kStrips;
  const int group = device::thread_index() % 32 / 4, place = device::thread_index() % 4;
  unsigned char* own_b = device::shared_memory();
  if (target.ds != nullptr) transpose_b<W, kRanks>(own_b, target.b, first_column, first_rank);

  const auto load = [&](int step, unsigned char* stage) {
    const int row = static_cast<int>(first_row) + step * kRows;
    copy_tile<X, kBackwardColumns>(stage, kRows, target.dy, row, first_column);
    if (target.db == nullptr) return;
    copy_few<W, kRanks>(stage + kBackwardStageBytes, kRows, target.s, row, first_rank);
  };

  StripSums<kTiles> db;
  const auto use = [&](int step, const unsigned char* stage) {
    // ds [16 rows, kOwn rank tiles] += dy [16, 32 columns] B [32, ranks], over all columns: left is
    // dy of rows `row` and row + 8, right is B^T of rank `group` of a tile, both of eight columns
    // from 8 place on, in two products. A lane's sums are of those rows, two ranks each.
    if (target.ds != nullptr && warp / kRowTiles < kSharing) {
      const int row = warp % kRowTiles * 16 + group, first_tile = warp / kRowTiles * kOwn;
      float sums[kOwn][4] = {};
      for (int i = 0; i < columns; i += 32) {
        const Eight<X> upper = read_eight<X>(stage, kRows, row, i / 8 + place);
        const Eight<X> lower = read_eight<X>(stage, kRows, row + 8, i / 8 + place);
        const Left<X, W> left[2] = {left_of_rows<W>(upper, lower, 0),
                                    left_of_rows<W>(upper, lower, 1)};
        MODXFER_UNROLL
        for (int k = 0; k < kOwn; ++k) {
          const Eight<W> weights =
              read_eight<W>(own_b, kRanks, 8 * (first_tile + k) + group, i / 8 + place);
          MODXFER_UNROLL
          for (int h = 0; h < 2; ++h) multiply(sums[k], left[h], right_of_row(weights, h));
        }
      }
      MODXFER_UNROLL
      for (int k = 0; k < kOwn; ++k) {
        MODXFER_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int64_t m = first_row + step * kRows + row + 8 * (i / 2);
          const int r = first_rank + 8 * (first_tile + k) + 2 * place + i % 2;
          if (m >= of.rows || r >= R) continue;
          target.ds[(static_cast<int64_t>(tile) * of.rows + m) * R + r] = target.scale * sums[k][i];
        }
      }
    }
    // dB [64 columns of the warp's strip, all ranks] += dy^T s over every second 16 rows, which of
    // them by the warp's part
    if (target.db == nullptr || strip * kStrip >= columns) return;
    for (int row = 16 * part; row < kRows; row += 16 * kDsDbParts) {
      db.template add<X, W>(stage, stage + kBackwardStageBytes, strip, row, [](Eight<X>&, int) {});
    }
  };

  unsigned char* ring = own_b + kDsDbOwnBytes<W, kTiles>;
  for_each_stage(ring, kDsDbStageBytes<X, W, kTiles>, (rows + kRows - 1) / kRows, load, use);
  if (target.db == nullptr) return;
  add_parts(db.of, ring, part, kDsDbParts);
  if (part > 0) return;
  db.for_each([&](int column, int rank, float sum) {
    const int n = first_column + strip * kStrip + column, r = first_rank + rank;
    if (n < N && r < R) target.db[(static_cast<int64_t>(share) * N + n) * R + r] = sum;
  });
}

}  // namespace modxfer::cuda
