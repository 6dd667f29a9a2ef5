// The passes of LoRA linears as a host asks for them. Torch-free.
//
// A pass is a `...Call`, the wide tensor and what belongs to all targets, and a list of
// `...Target`s that share it. For it a function below
//
//   kernel   takes that of the dtypes and the largest rank            with_kernel
//   slots    cuts targets into ranks that a warp has, at most 8 kTiles
//   launch   fills a kernel's arguments, with as many as they hold     for_each_launch
//   grid     counts the blocks and their shared memory
//
// and calls launch(kernel, grid, arguments), CUDA's or the emulator's. Of the number of a block,
// that of its tile of columns or group of slots changes fastest, that of its share of rows slowest.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "lora_da.cuh"
#include "lora_ds_db.cuh"
#include "lora_reduce.cuh"
#include "lora_shrink.cuh"
#include "rows.cuh"

namespace modxfer::cuda {

// What blocks are planned for. The multiprocessors are one number for every GPU, those of an H100,
// so that sums are taken in one order on all of them.
struct Gpu {
  int most_shared;  // bytes of a block
  int multiprocessors = 132;
};

struct Wide {
  const void* data;
  int64_t row_stride, column_stride;
};

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<X>, Type<W>) for x of one kind and adapters of another; both are the same, or the
// adapters are floats.
template <class Body>
void with_types(Kind x, Kind adapters, const Body& body) {
  using device::Bf16;
  using device::Half;
  if (adapters == Kind::kBf16) return body(Type<Bf16>{}, Type<Bf16>{});
  if (adapters == Kind::kHalf) return body(Type<Half>{}, Type<Half>{});
  if (x == Kind::kBf16) return body(Type<Bf16>{}, Type<float>{});
  if (x == Kind::kHalf) return body(Type<Half>{}, Type<float>{});
  body(Type<float>{}, Type<float>{});
}

// Calls body(tiles), an integral_constant: so many rank tiles of 8 that they hold the largest rank,
// or the most there are, 4 of floats and 8 of halves. A higher rank takes several slots or blocks.
template <class W, class Body>
void with_tiles(int rank, const Body& body) {
  if (rank <= 16) return body(std::integral_constant<int, 2>{});
  if constexpr (sizeof(W) == 2) {
    if (rank > 32) return body(std::integral_constant<int, 8>{});
  }
  body(std::integral_constant<int, 4>{});
}

// Calls body(Type<X>, Type<W>, tiles) for the kernel of these targets.
template <class Target, class Body>
void with_kernel(Kind x, Kind adapters, const std::vector<Target>& targets, const Body& body) {
  int rank = 0;
  for (const Target& target : targets) rank = std::max(rank, target.rank);
  with_types(x, adapters, [&](auto x_type, auto type) {
    using W = typename decltype(type)::type;
    with_tiles<W>(rank, [&](auto tiles) { body(x_type, type, tiles); });
  });
}

inline int blocks_of(int64_t size, int of_a_block) {
  return static_cast<int>((size + of_a_block - 1) / of_a_block);
}

// Slots of a block: at most `most`, for its warps, and few enough for its shared memory; then as
// few as leave the number of blocks what it is, so that each has as many.
template <class Bytes>
int slots_at_once(int num_slots, int most, int most_shared, const Bytes& bytes_of) {
  int slots = std::min(num_slots, most);
  while (slots > 1 && bytes_of(slots) > most_shared) --slots;
  return blocks_of(num_slots, blocks_of(num_slots, slots));
}

// Calls body(first, count) for as many slots, targets or jobs as fit the arguments of a kernel.
template <class Part, int kMost, class Body>
void for_each_launch(const std::vector<Part>& parts, const Part (&)[kMost], const Body& body) {
  for (size_t i = 0; i < parts.size(); i += kMost) {
    body(parts.data() + i, static_cast<int>(std::min<size_t>(kMost, parts.size() - i)));
  }
}

// --- shrink

struct ShrinkTarget {
  const void* a;  // [R, K], side by side
  int rank;
  float scale;
  uint32_t threshold;
};

struct ShrinkCall {
  Kind kind, adapters;
  Wide x;
  int rows, columns;
  const uint64_t* seed;
  uint32_t* bits;
  void* s;
};

template <class Launch>
void shrink(const ShrinkCall& call, const std::vector<ShrinkTarget>& targets, const Gpu& gpu,
            const Launch& launch) {
  const auto run = [&](auto x, auto w, auto tiles) {
    using X = typename decltype(x)::type;
    using W = typename decltype(w)::type;
    constexpr int kTiles = decltype(tiles)::value, kWarps = kShrinkThreads / 32;
    std::vector<ShrinkSlot<W>> slots;
    int column = 0;
    for (size_t t = 0; t < targets.size(); ++t) {
      const ShrinkTarget& target = targets[t];
      for (int r = 0; r < target.rank; r += 8 * kTiles) {
        const W* a = static_cast<const W*>(target.a) + static_cast<int64_t>(r) * call.columns;
        const int ranks = std::min(8 * kTiles, target.rank - r);
        slots.push_back({strided<W>(a, call.columns, 1, ranks, call.columns), column, target.scale,
                         static_cast<uint32_t>(t), target.threshold, r == 0});
        column += ranks;
      }
    }
    Shrink<X, W> of = {};
    of.x =
        strided<X>(call.x.data, call.x.row_stride, call.x.column_stride, call.rows, call.columns);
    of.seed = call.seed;
    of.bits = call.bits;
    of.s = static_cast<W*>(call.s);
    of.sum_ranks = column;
    of.tile_rows = 64;
    // smaller tiles until there are blocks for all multiprocessors
    while (of.tile_rows > 16 && call.rows < of.tile_rows * gpu.multiprocessors) of.tile_rows /= 2;
    const int row_tiles = of.tile_rows / 16;
    const auto bytes_of = [&](int count) {
      return kStages * shrink_stage_bytes<X, W, kTiles>(of.tile_rows, count);
    };
    for_each_launch(slots, of.slots, [&](const ShrinkSlot<W>* first, int count) {
      std::copy_n(first, count, of.slots);
      of.num_slots = count;
      of.slots_at_once = slots_at_once(count, kWarps / row_tiles, gpu.most_shared, bytes_of);
      const int warps = row_tiles * of.slots_at_once;
      of.parts = 1;  // warps that are left share the columns of a stage
      while (2 * of.parts <= kShrinkColumns<X> / 32 && 2 * of.parts * warps <= kWarps) {
        of.parts *= 2;
      }
      const int blocks = blocks_of(call.rows, of.tile_rows) * blocks_of(count, of.slots_at_once);
      launch(lora_shrink<X, W, kTiles>,
             device::Grid{blocks, 32 * warps * of.parts, 1, bytes_of(of.slots_at_once)}, of);
    });
  };
  with_kernel(call.kind, call.adapters, targets, run);
}

// --- ds and dB

struct DyTarget {
  Wide dy;
  const void* b;  // [N, R], side by side
  int width, rank;
  int column;  // of s, where its ranks begin
  float scale;
  float* ds;  // or nullptr, as in DsDbTarget
  float* db;
};

struct DsDbCall {
  Kind kind, adapters;
  int rows, share_rows;
  const void* s;  // [M, sum R], or nullptr
  int sum_ranks;
};

template <class Launch>
void ds_db(const DsDbCall& call, const std::vector<DyTarget>& targets, const Launch& launch) {
  const auto run = [&](auto x, auto w, auto tiles) {
    using X = typename decltype(x)::type;
    using W = typename decltype(w)::type;
    constexpr int kTiles = decltype(tiles)::value;
    std::vector<DsDbTarget<X, W>> found;
    for (const DyTarget& target : targets) {
      const Wide& dy = target.dy;
      const W* s = static_cast<const W*>(call.s) + (call.s == nullptr ? 0 : target.column);
      found.push_back(
          {strided<X>(dy.data, dy.row_stride, dy.column_stride, call.rows, target.width),
           strided<W>(target.b, target.rank, 1, target.width, target.rank),
           strided<W>(s, call.sum_ranks, 1, call.rows, target.rank), target.ds, target.db,
           target.scale});
    }
    DsDb<X, W> of = {};
    of.rows = call.rows;
    of.share_rows = call.share_rows;
    for_each_launch(found, of.targets, [&](const DsDbTarget<X, W>* first, int count) {
      std::copy_n(first, count, of.targets);
      of.num_targets = count;
      int blocks = 0;
      for (int i = 0; i < count; ++i) {
        const Strided<W>& b = of.targets[i].b;
        of.targets[i].first_block = blocks;
        blocks += blocks_of(b.rows, kBackwardColumns) * blocks_of(b.columns, 8 * kTiles) *
                  blocks_of(call.rows, call.share_rows);
      }
      constexpr int kBytes = kDsDbOwnBytes<W, kTiles> + kStages * kDsDbStageBytes<X, W, kTiles>;
      launch(lora_ds_db<X, W, kTiles>, device::Grid{blocks, kDsDbThreads, 1, kBytes}, of);
    });
  };
  with_kernel(call.kind, call.adapters, targets, run);
}

// --- dA

struct DaTarget {
  const void* ds;       // [M, R], side by side
  const uint8_t* mask;  // [M, 4 ceil(K / 32)], or nullptr
  int rank;
  float* da;  // [shares of M, R, K]
};

struct DaCall {
  Kind kind, adapters;
  Wide x;
  int rows, columns, share_rows;
};

template <class Launch>
void da(const DaCall& call, const std::vector<DaTarget>& targets, const Gpu& gpu,
        const Launch& launch) {
  const auto run = [&](auto x, auto w, auto tiles) {
    using X = typename decltype(x)::type;
    using W = typename decltype(w)::type;
    constexpr int kTiles = decltype(tiles)::value;
    const int64_t K = call.columns;
    const int mask_bytes = 4 * blocks_of(K, 32);
    std::vector<DaSlot<W>> slots;
    for (const DaTarget& target : targets) {
      for (int r = 0; r < target.rank; r += 8 * kTiles) {
        const int ranks = std::min(8 * kTiles, target.rank - r);
        slots.push_back(
            {strided<W>(static_cast<const W*>(target.ds) + r, target.rank, 1, call.rows, ranks),
             strided<uint8_t>(target.mask, mask_bytes, 1, call.rows, mask_bytes), target.da + r * K,
             target.rank * K});
      }
    }
    Da<X, W> of = {};
    of.x =
        strided<X>(call.x.data, call.x.row_stride, call.x.column_stride, call.rows, call.columns);
    of.share_rows = call.share_rows;
    const auto bytes_of = [](int count) { return kStages * da_stage_bytes<X, W, kTiles>(count); };
    for_each_launch(slots, of.slots, [&](const DaSlot<W>* first, int count) {
      std::copy_n(first, count, of.slots);
      of.num_slots = count;
      of.slots_at_once =
          slots_at_once(count, kDaThreads<W, kTiles> / (32 * kStrips), gpu.most_shared, bytes_of);
      const int warps = kStrips * of.slots_at_once;
      of.parts = 2 * 32 * warps <= kDaThreads<W, kTiles> ? 2 : 1;
      const int blocks = blocks_of(count, of.slots_at_once) *
                         blocks_of(call.columns, kBackwardColumns) *
                         blocks_of(call.rows, call.share_rows);
      launch(lora_da<X, W, kTiles>,
             device::Grid{blocks, 32 * warps * of.parts, 1, bytes_of(of.slots_at_once)}, of);
    });
  };
  with_kernel(call.kind, call.adapters, targets, run);
}

// --- sums of partial sums

struct Parts {
  const float* parts;
  void* out;
  int64_t size;
  int count;
};

template <class Launch>
void reduce(Kind adapters, const std::vector<Parts>& all, const Launch& launch) {
  with_types(adapters, adapters, [&](auto, auto w) {
    using W = typename decltype(w)::type;
    std::vector<ReduceJob<W>> jobs;
    for (const Parts& each : all) {
      jobs.push_back({each.parts, static_cast<W*>(each.out), each.size, each.count});
    }
    Reduce<W> of = {};
    for_each_launch(jobs, of.jobs, [&](const ReduceJob<W>* first, int count) {
      std::copy_n(first, count, of.jobs);
      of.num_jobs = count;
      int blocks = 0;
      for (int i = 0; i < count; ++i) {
        of.jobs[i].first_block = blocks;
        blocks += blocks_of(of.jobs[i].size, kReduceThreads);
      }
      launch(lora_reduce<W>, device::Grid{blocks, kReduceThreads, 1, 0}, of);
    });
  });
}

}  // namespace modxfer::cuda
