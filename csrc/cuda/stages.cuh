// Tiles of matrices in shared memory, through a ring of stages that asynchronous copies fill.
// Torch-free.
//
// A tile is [segments][rows][128 bytes], in chunks of 16 bytes. Where a chunk lies depends on its
// row as well, so that no two lanes of a quarter of a warp meet in a bank, neither with two rows of
// four chunks, sums over columns, nor with four rows of two, sums over rows.
#pragma once

#include "fragments.cuh"

namespace modxfer::cuda {

constexpr int kSegmentBytes = 128, kChunkBytes = 16, kSegmentChunks = 8;

template <class T>
constexpr int kChunk = kChunkBytes / sizeof(T);  // numbers of it

// A matrix in memory, strides in elements.
template <class T>
struct Strided {
  const T* data;
  int64_t row_stride, column_stride;
  int rows, columns;
  bool has_chunks;  // can be copied by 16 bytes
};

template <class T>
Strided<T> strided(const void* data, int64_t row_stride, int64_t column_stride, int rows,
                   int columns) {
  const uint64_t bytes = static_cast<uint64_t>(row_stride) * sizeof(T);
  const bool has_chunks =
      column_stride == 1 && (reinterpret_cast<uintptr_t>(data) | bytes) % kChunkBytes == 0;
  return {static_cast<const T*>(data), row_stride, column_stride, rows, columns, has_chunks};
}

template <class T>
struct alignas(kChunkBytes) Chunk {
  T of[kChunk<T>];
};

// shared = the chunk at a row and column, which is complete with the stage; zeros past the matrix.
template <class T>
MODXFER_DEVICE void copy_chunk(unsigned char* shared, const Strided<T>& from, int row, int column) {
  const T* at = from.data + row * from.row_stride + column * from.column_stride;
  if (from.has_chunks && row < from.rows && column + kChunk<T> <= from.columns) {
    device::copy_async(shared, at);
    return;
  }
  Chunk<T> chunk = {};
  MODXFER_UNROLL
  for (int i = 0; i < kChunk<T>; ++i) {
    if (row < from.rows && column + i < from.columns) chunk.of[i] = *at;
    at += from.column_stride;
  }
  *reinterpret_cast<Chunk<T>*>(shared) = chunk;
}

// Calls body(row, chunk) for each of [rows, kChunks], by all threads of the block, each of which
// keeps its chunk: kChunks divides them.
template <int kChunks, class Body>
MODXFER_DEVICE void for_each_chunk(int rows, const Body& body) {
  const int thread = device::thread_index();
  for (int row = thread / kChunks; row < rows; row += device::block_size() / kChunks) {
    body(row, thread % kChunks);
  }
}

// The byte of a tile at which a chunk of a row begins. Of floats two chunks are an Eight: those
// that come first lie together, and those that come second.
template <class T>
MODXFER_DEVICE int place_of(int rows, int row, int chunk) {
  int within = chunk & (kSegmentChunks - 1);
  if (sizeof(T) == 4) within = (within & 1) << 2 | within >> 1;
  within ^= (row & 1) << 2 | (row & 2);
  return (chunk / kSegmentChunks * rows + row) * kSegmentBytes + within * kChunkBytes;
}

template <class T, int kColumns>
MODXFER_DEVICE void copy_tile(unsigned char* tile, int rows, const Strided<T>& from, int first_row,
                              int first_column) {
  for_each_chunk<kColumns / kChunk<T>>(rows, [&](int row, int chunk) {
    copy_chunk(tile + place_of<T>(rows, row, chunk), from, first_row + row,
               first_column + chunk * kChunk<T>);
  });
}

// Columns 8 index to 8 index + 7 of a row of a tile.
template <class T>
MODXFER_DEVICE Eight<T> read_eight(const unsigned char* tile, int rows, int row, int index) {
  if constexpr (sizeof(T) == 2) {
    return *reinterpret_cast<const Eight<T>*>(tile + place_of<T>(rows, row, index));
  } else {
    Eight<T> eight;
    MODXFER_UNROLL
    for (int half = 0; half < 2; ++half) {
      const auto* from = tile + place_of<T>(rows, row, 2 * index + half);
      const auto chunk = *reinterpret_cast<const Chunk<T>*>(from);
      MODXFER_UNROLL
      for (int i = 0; i < 4; ++i) eight.of[4 * half + i] = chunk.of[i];
    }
    return eight;
  }
}

// Rows of few numbers, which are read one by one, four rows together: so many bytes a row, an odd
// number of those that eight lanes read.
template <class T, int kColumns>
constexpr int kFewBytes = (kColumns / 8 / 2 * 2 + 1) * 8 * static_cast<int>(sizeof(T));

template <class T, int kColumns>
MODXFER_DEVICE void copy_few(unsigned char* tile, int rows, const Strided<T>& from, int first_row,
                             int first_column) {
  for_each_chunk<kColumns / kChunk<T>>(rows, [&](int row, int chunk) {
    copy_chunk(tile + row * kFewBytes<T, kColumns> + chunk * kChunkBytes, from, first_row + row,
               first_column + chunk * kChunk<T>);
  });
}

// load(step, stage) starts the copies of a step, use(step, stage) computes with them; kStages of so
// many bytes.
constexpr int kStages = 3;

template <class Load, class Use>
MODXFER_DEVICE void for_each_stage(unsigned char* ring, int bytes, int steps, const Load& load,
                                   const Use& use) {
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step, ring + step * bytes);
    device::commit_async();
  }
  for (int step = 0; step < steps; ++step) {
    device::wait_async<kStages - 2>();
    device::sync_block();  // all have copied this stage, and are done with the one before
    const int next = step + kStages - 1;
    if (next < steps) load(next, ring + next % kStages * bytes);
    device::commit_async();
    use(step, ring + step % kStages * bytes);
  }
}

// Adds up the sums of the parts of a block, in order, for part 0; the warps of each part follow
// those of the one before, and are alike. So many bytes of shared memory: of the sums of all parts
// but one.
template <class Sums>
MODXFER_DEVICE void add_parts(Sums& sums, unsigned char* shared, int part, int parts) {
  constexpr int kCount = sizeof(Sums) / sizeof(float);
  auto* own = reinterpret_cast<float*>(&sums);
  const int warps = device::block_size() / 32 / parts;
  const int warp = device::thread_index() / 32 % warps, lane = device::thread_index() % 32;
  const auto of_part = [&](int other) {
    return reinterpret_cast<float*>(shared) + ((other - 1) * warps + warp) * kCount * 32 + lane;
  };
  device::sync_block();  // all are done with what lies there
  if (part > 0) {
    MODXFER_UNROLL
    for (int i = 0; i < kCount; ++i) of_part(part)[32 * i] = own[i];
  }
  device::sync_block();
  if (part > 0) return;
  for (int other = 1; other < parts; ++other) {
    MODXFER_UNROLL
    for (int i = 0; i < kCount; ++i) own[i] += of_part(other)[32 * i];
  }
}

}  // namespace modxfer::cuda
