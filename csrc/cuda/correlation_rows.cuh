// Centred rows and their sums, and fp32 products added to fp64. Torch-free; formulas in
// kernels/correlation/op.py.
//
//   centre   a block has 128 columns of some rows: reads x, writes x - shift, and leaves sums and
//            squares in fp64, one partial result a block, in the order of its warps
//   add      total += tile, four neighbours a thread; 20 bytes an element
//
// Each is one pass over memory.
#pragma once

#include "row_in_registers.cuh"

namespace modxfer::cuda {

constexpr int kCentreWarps = 8, kCentreColumns = 4 * kLanes, kCentreRows = 128;
constexpr int kAddThreads = 256;

struct CentreRows {
  Matrix x;             // [rows, width]
  const bool* mask;     // [rows], or nullptr; a row with false is not read
  const double* shift;  // [width]
  Matrix centred;       // [rows, width], floats; may be x
  double* partial;      // [ceil(rows / kCentreRows), 2, width]
  int rows, width;
};

// The bytes of shared memory that a block needs: sums and squares of each warp's rows.
constexpr int kCentreBytes = kCentreWarps * 2 * kCentreColumns * static_cast<int>(sizeof(double));

MODXFER_BOTH int num_columns_of_blocks(int width) {
  return (width + kCentreColumns - 1) / kCentreColumns;
}
MODXFER_BOTH int num_rows_of_blocks(int rows) { return (rows + kCentreRows - 1) / kCentreRows; }

MODXFER_DEVICE bool is_aligned(const Matrix& matrix) {
  const auto bits = reinterpret_cast<uintptr_t>(matrix.rows) |
                    static_cast<uint64_t>(matrix.stride * size_of(matrix.kind));
  return bits % 16 == 0;
}

// A block of kCentreWarps warps for each rows-of-blocks by columns-of-blocks.
MODXFER_KERNEL void correlation_centre_rows(MODXFER_ARGUMENT CentreRows of) {
  const int columns = num_columns_of_blocks(of.width);
  const int row_block = device::cluster_index() / columns;
  const int first = device::cluster_index() % columns * kCentreColumns;
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  const int i = first + 4 * lane;
  const int n = of.width - i < 4 ? of.width - i : 4;
  const bool x_is_aligned = is_aligned(of.x);
  const Target centred(of.centred.rows, of.centred.stride, of.centred.kind);

  Four shift = {};
  double sums[4] = {}, squares[4] = {};
  MODXFER_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (j < n) shift.of[j] = static_cast<float>(of.shift[i + j]);
  }
  const int begin = row_block * kCentreRows;
  const int end = begin + kCentreRows < of.rows ? begin + kCentreRows : of.rows;
  for (int row = begin + warp; row < end; row += kCentreWarps) {
    Four values = {};
    if (n > 0 && (of.mask == nullptr || of.mask[row])) {
      const auto* from = static_cast<const unsigned char*>(of.x.rows) +
                         (row * of.x.stride + i) * size_of(of.x.kind);
      read_four(from, of.x.kind, x_is_aligned, n, values);
      MODXFER_UNROLL
      for (int j = 0; j < 4; ++j) {
        values.of[j] -= shift.of[j];
        sums[j] += values.of[j];
        squares[j] += static_cast<double>(values.of[j]) * values.of[j];
      }
    }
    if (n > 0) centred.put(row, i, n, values);
  }

  // --- the warps' sums, in their order
  auto* shared = reinterpret_cast<double*>(device::shared_memory());
  double* own = shared + warp * 2 * kCentreColumns + 4 * lane;
  MODXFER_UNROLL
  for (int j = 0; j < 4; ++j) {
    own[j] = sums[j];
    own[kCentreColumns + j] = squares[j];
  }
  device::sync_block();
  const int which = device::thread_index() / kCentreColumns;  // of sums and squares
  const int column = device::thread_index() % kCentreColumns;
  if (first + column >= of.width) return;
  double total = 0.0;
  for (int w = 0; w < kCentreWarps; ++w) total += shared[(2 * w + which) * kCentreColumns + column];
  of.partial[(static_cast<int64_t>(row_block) * 2 + which) * of.width + first + column] = total;
}

struct AddTile {
  const float* tile;  // [rows, width], contiguous
  double* total;      // rows so many elements apart
  int64_t stride;
  int rows, width;
};

struct alignas(16) TwoDoubles {
  double of[2];
};

// Of kAddThreads threads; a block takes 4 kAddThreads columns of a row.
MODXFER_BOTH int num_blocks_a_row(int width) {
  return (width + 4 * kAddThreads - 1) / (4 * kAddThreads);
}

MODXFER_KERNEL void correlation_add_tile(MODXFER_ARGUMENT AddTile of) {
  const int blocks = num_blocks_a_row(of.width), row = device::cluster_index() / blocks;
  const int i = 4 * (device::cluster_index() % blocks * kAddThreads + device::thread_index());
  const float* tile = of.tile + static_cast<int64_t>(row) * of.width + i;
  double* total = of.total + row * of.stride + i;
  const auto bits = reinterpret_cast<uintptr_t>(tile) | reinterpret_cast<uintptr_t>(total);
  if (bits % 16 == 0 && i + 4 <= of.width) {
    const Four values = *reinterpret_cast<const Four*>(tile);
    auto* pairs = reinterpret_cast<TwoDoubles*>(total);
    MODXFER_UNROLL
    for (int j = 0; j < 2; ++j) {
      TwoDoubles pair = pairs[j];
      pair.of[0] += values.of[2 * j];
      pair.of[1] += values.of[2 * j + 1];
      pairs[j] = pair;
    }
    return;
  }
  for (int j = 0; j < 4 && i + j < of.width; ++j) total[j] += tile[j];
}

}  // namespace modxfer::cuda
