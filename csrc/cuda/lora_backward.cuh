// What the passes of the backward share: sums over rows, of 256 columns of a wide tensor and a
// block each, a strip of 64 columns a warp. Torch-free; notation of kernels/lora_linear/op.py.
#pragma once

#include "stages.cuh"

namespace modxfer::cuda {

constexpr int kBackwardColumns = 256, kStrip = 64, kStrips = kBackwardColumns / kStrip;
constexpr int kBackwardStageBytes = 32 * 1024;  // of the wide tensor

// Rows of a stage.
template <class X>
constexpr int kBackwardRows =
    kBackwardStageBytes / (kBackwardColumns * static_cast<int>(sizeof(X)));

// Of a strip, the transposed sums: a lane has columns 8 g to 8 g + 7, two a pair, and of each rank
// tile ranks 2 t and 2 t + 1.
template <int kTiles>
struct StripSums {
  float of[4][kTiles][4] = {};

  // += x^T few over 16 rows of a stage from `row` on; few: a tile of rows of numbers, one a rank.
  // change(x, row): what is done to eight columns of a row that a lane reads.
  template <class X, class W, class Change>
  MODXFER_DEVICE void add(const unsigned char* wide, const unsigned char* few, int strip, int row,
                          const Change& change) {
    constexpr int kFew = kFewBytes<W, 8 * kTiles>;
    const int group = device::thread_index() % 32 / 4, place = device::thread_index() % 4;
    Eight<X> rows[4];
    MODXFER_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int at = row + place + 4 * i;
      rows[i] = read_eight<X>(wide, kBackwardRows<X>, at, kStrip / 8 * strip + group);
      change(rows[i], at);
    }
    const unsigned char* own = few + (row + place) * kFew + group * sizeof(W);
    Right<W> ranks[kTiles];
    MODXFER_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      ranks[tile] = right_of_column<W>(own + tile * 8 * sizeof(W), kFew);
    }
    MODXFER_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      const Left<X, W> left = left_of_columns<W>(rows, pair);
      MODXFER_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) multiply(of[pair][tile], left, ranks[tile]);
    }
  }

  // Calls body(column, rank, sum) for each that this lane has; columns are of the strip.
  template <class Body>
  MODXFER_DEVICE void for_each(const Body& body) const {
    const int group = device::thread_index() % 32 / 4, place = device::thread_index() % 4;
    MODXFER_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      MODXFER_UNROLL
      for (int e = 0; e < 2; ++e) {
        MODXFER_UNROLL
        for (int column = 0; column < 8; ++column) {
          body(8 * group + column, 8 * tile + 2 * place + e,
               of[column / 2][tile][2 * (column % 2) + e]);
        }
      }
    }
  }
};

}  // namespace modxfer::cuda
