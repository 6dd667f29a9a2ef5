// Rows of logits, a cluster of blocks a row: each block's slice of them, in its shared memory where
// it fits, and how threads, blocks and clusters add up what they find.
#pragma once

#include "device.cuh"
#include "kd_loss_plan.h"
#include "modxfer/bend.h"

namespace modxfer::cuda {

#include "scalar.cuh"

constexpr float kInf = __builtin_huge_valf();
constexpr float kNoTop = -3.40282347e38f;  // below it are classes without probability alone
constexpr float kLog2E = 1.44269504f;
constexpr int kLanes = 32, kMaxWarps = 32;
constexpr int kTile = 2048;  // floats of a bulk copy

enum class Kind : int { kFloat, kBf16, kHalf };

MODXFER_BOTH int size_of(Kind kind) { return kind == Kind::kFloat ? 4 : 2; }

// Of a row that so many blocks share, a multiple of 8.
MODXFER_BOTH int slice_size(int classes, int blocks) {
  return ((classes + blocks - 1) / blocks + 7) / 8 * 8;
}

// z of a raw logit, bias included.
MODXFER_DEVICE float bent(float raw, const Bend& bend) {
  if (bend.cap == 0.0f) return raw * bend.scale;
  const float x = raw * (bend.scale / bend.cap);
  const float e = vexp(-2.0f * vabs(x));
  const float small = x * (1.0f - x * x * (1.0f / 3.0f - x * x * (2.0f / 15.0f)));
  const float large = (1.0f - e) / (1.0f + e);
  const float t = vabs(x) < 0.1f ? small : x < 0.0f ? -large : large;
  return vabs(raw) == kInf ? raw : bend.cap * t;
}

MODXFER_DEVICE float bend_slope(float z, const Bend& bend) {
  if (bend.cap == 0.0f) return bend.scale;
  const float t = vmax(vmin(z / bend.cap, 1.0f), -1.0f);
  return bend.scale * (1.0f - t * t);
}

// The same number in all threads of the block, added up in one order.
template <bool kIsMax, int kCount>
MODXFER_DEVICE void reduce_block(float* values, float* warps) {
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  MODXFER_UNROLL
  for (int i = 0; i < kCount; ++i) {
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      const float other = device::from_lane_xor(values[i], mask);
      values[i] = kIsMax ? vmax(other, values[i]) : values[i] + other;
    }
  }
  device::sync_block();  // the values of the last reduction are read
  if (lane == 0) {
    MODXFER_UNROLL
    for (int i = 0; i < kCount; ++i) warps[warp * kCount + i] = values[i];
  }
  device::sync_block();
  const int num_warps = device::block_size() / kLanes;
  MODXFER_UNROLL
  for (int i = 0; i < kCount; ++i) {
    float total = warps[i];
    for (int w = 1; w < num_warps; ++w) {
      const float other = warps[w * kCount + i];
      total = kIsMax ? vmax(other, total) : total + other;
    }
    values[i] = total;
  }
}

// Gives every block this one's values: [blocks, kCount] of its shared memory. A barrier of the
// cluster follows.
template <int kCount>
MODXFER_DEVICE void tell(const float* values, float* all) {
  if (device::thread_index() >= device::cluster_size()) return;
  float* there = device::of_rank(all, device::thread_index()) + device::cluster_rank() * kCount;
  MODXFER_UNROLL
  for (int i = 0; i < kCount; ++i) there[i] = values[i];
}

// Gives every block the values of each.
template <int kCount>
MODXFER_DEVICE void exchange(const float* values, float* all) {
  tell<kCount>(values, all);
  device::sync_cluster();
}

struct alignas(16) Four {
  float of[4];
};

struct alignas(8) FourHalves {
  uint16_t of[4];
};

// The logits of a row on one side, of a dtype that is known at run time.
struct Side {
  const void* rows;
  int64_t stride;
  Kind kind;
  Bend bend;
  unsigned char* own = nullptr;  // a block's slice of one row, in shared memory

  MODXFER_DEVICE const unsigned char* at(int row, int i) const {
    return static_cast<const unsigned char*>(rows) + (row * stride + i) * size_of(kind);
  }
};

// Four values from an address, the first n of them where there are fewer; those past are -inf,
// classes without probability.
MODXFER_DEVICE void read_four(const unsigned char* from, Kind kind, bool is_aligned, int n,
                              Four& z) {
  if (kind == Kind::kFloat && is_aligned && n == 4) {
    z = *reinterpret_cast<const Four*>(from);
    return;
  }
  FourHalves bits = {};
  const bool is_wide = kind == Kind::kFloat;
  if (!is_wide && is_aligned && n == 4) bits = *reinterpret_cast<const FourHalves*>(from);
  MODXFER_UNROLL
  for (int k = 0; k < 4; ++k) {
    z.of[k] = -kInf;
    if (k >= n) continue;
    if (is_wide) {
      z.of[k] = reinterpret_cast<const float*>(from)[k];
    } else {
      if (!is_aligned || n < 4) bits.of[k] = reinterpret_cast<const uint16_t*>(from)[k];
      z.of[k] = device::from_bits(bits.of[k], kind == Kind::kBf16);
    }
  }
}

// Writes the first n of four values.
MODXFER_DEVICE void put_four(unsigned char* to, Kind kind, bool is_aligned, int n, const Four& z) {
  const bool is_wide = kind == Kind::kFloat;
  if (is_wide && is_aligned && n == 4) {
    *reinterpret_cast<Four*>(to) = z;
    return;
  }
  FourHalves bits = {};
  MODXFER_UNROLL
  for (int k = 0; k < 4; ++k) {
    if (k >= n) break;
    if (is_wide) {
      reinterpret_cast<float*>(to)[k] = z.of[k];
    } else {
      bits.of[k] = device::to_bits(z.of[k], kind == Kind::kBf16);
      if (!is_aligned || n < 4) reinterpret_cast<uint16_t*>(to)[k] = bits.of[k];
    }
  }
  if (!is_wide && is_aligned && n == 4) *reinterpret_cast<FourHalves*>(to) = bits;
}

// value = z[k], if there is one
MODXFER_DEVICE void pick(const Four& z, int k, float& value) {
  MODXFER_UNROLL
  for (int i = 0; i < 4; ++i) value = i == k ? z.of[i] : value;
}

// Rows of a gradient, of a dtype that is known at run time.
class Target {
 public:
  MODXFER_DEVICE Target(void* rows, int64_t stride, Kind kind)
      : rows_(static_cast<unsigned char*>(rows)), stride_(stride * size_of(kind)), kind_(kind) {
    is_aligned_ = (reinterpret_cast<uintptr_t>(rows) | static_cast<uint64_t>(stride_)) % 16 == 0;
  }

  // i is a multiple of 4 where n is 4.
  MODXFER_DEVICE void put(int row, int i, int n, const Four& values) const {
    put_four(rows_ + row * stride_ + static_cast<int64_t>(i) * size_of(kind_), kind_, is_aligned_,
             n, values);
  }

 private:
  unsigned char* rows_;
  int64_t stride_;  // in bytes
  Kind kind_;
  bool is_aligned_;
};

// The bytes of shared memory that a block's slices of rows on so many sides need, which it holds,
// and a barrier a tile.
MODXFER_BOTH int slices_bytes(int sides, int classes, int blocks, Kind kind) {
  const int size = slice_size(classes, blocks), tiles = (size + kTile - 1) / kTile;
  return sides * size * size_of(kind) + tiles * static_cast<int>(sizeof(device::Barrier));
}

// A block's classes of the rows on kSides sides: raw logits in shared memory, once each is read and
// its bias added, or where they lie.
template <int kSides, bool kIsResident>
class Sides {
 public:
  MODXFER_DEVICE Sides(const Side (&sides)[kSides], int classes, unsigned char* memory) {
    const int size = slice_size(classes, device::cluster_size());
    begin_ = device::cluster_rank() * size;
    size_ = classes - begin_ < size ? classes - begin_ : size;
    if (size_ < 0) size_ = 0;
    uint64_t bits = 0;
    MODXFER_UNROLL
    for (int i = 0; i < kSides; ++i) {
      sides_[i] = sides[i];
      sides_[i].own = memory;
      const int bytes = size_of(sides[i].kind);
      if (kIsResident) memory += size * bytes;
      bits |= reinterpret_cast<uintptr_t>(sides[i].rows) |
              static_cast<uint64_t>(sides[i].stride * bytes);
    }
    is_aligned_ = bits % 16 == 0;
    full_ = reinterpret_cast<device::Barrier*>(memory);
  }

  MODXFER_DEVICE int begin() const { return begin_; }
  MODXFER_DEVICE int size() const { return size_; }
  MODXFER_DEVICE int num_tiles() const { return (size_ + kTile - 1) / kTile; }

  // Starts the copies of the cluster's first row, of so many rows.
  MODXFER_DEVICE void start(int rows) {
    if constexpr (kIsResident) {
      const bool leads = device::thread_index() == 0;
      if (leads) {
        for (int tile = 0; tile < num_tiles(); ++tile) full_[tile].init(1);
        device::fence_barriers();
      }
      device::sync_cluster();  // a block runs before another writes into it
      const int row = device::cluster_index();
      if (!leads || row >= rows) return;
      for (int tile = 0; tile < num_tiles(); ++tile) load(row, tile);
    }
  }

  // The block is done with a tile of a row: starts its copy of the cluster's next row.
  MODXFER_DEVICE void refill(int tile, int row, int rows) {
    if constexpr (kIsResident) {
      const int next = row + device::num_clusters();
      if (next >= rows) return;
      device::fence_copies();  // by all, who may have added a bias to what was copied
      device::sync_block();
      if (device::thread_index() > 0) return;
      load(next, tile);
    }
  }

  // Until a tile of the block's row number `turn` has come.
  MODXFER_DEVICE void wait(int tile, int turn) {
    if constexpr (kIsResident) {
      if (num_copied(tile) > 0) full_[tile].wait(turn & 1);
    }
  }

  // Calls body(i, n) for the n <= 4 classes from i on that this thread has of a tile: the same of
  // each pass over a row. All threads take a step together, also those that have none, n <= 0.
  template <class Body>
  MODXFER_DEVICE void for_each_step(int tile, const Body& body) const {
    const int end = tile * kTile + count_of(tile);
    for (int step = tile * kTile; step < end; step += 4 * device::block_size()) {
      const int i = step + 4 * device::thread_index();
      body(i, end - i < 4 ? end - i : 4);
    }
  }

  template <class Body>
  MODXFER_DEVICE void for_each_four(int tile, const Body& body) const {
    for_each_step(tile, [&](int i, int n) {
      if (n > 0) body(i, n);
    });
  }

  // The logits as the loss sees them, of each side; `again` after the thread's first reading of
  // this row.
  MODXFER_DEVICE void read(int row, int i, int n, bool again, Four (&z)[kSides]) const {
    MODXFER_UNROLL
    for (int side = 0; side < kSides; ++side) read_side(sides_[side], row, i, n, again, z[side]);
  }

 private:
  // By one thread.
  MODXFER_DEVICE void load(int row, int tile) {
    const int bytes = num_copied(tile) * size_of(sides_[0].kind);
    if (bytes == 0) return;
    full_[tile].arrive_expecting(kSides * bytes);
    const int i = tile * kTile;
    for (const Side& side : sides_) {
      device::copy_bulk(own(side, i), side.at(row, begin_ + i), bytes, full_[tile]);
    }
  }

  MODXFER_DEVICE int count_of(int tile) const {
    const int left = size_ - tile * kTile;
    return left < kTile ? left : kTile;
  }
  // Of a tile, those that a bulk copy brings: 16 bytes at least, whatever the dtype.
  MODXFER_DEVICE int num_copied(int tile) const { return is_aligned_ ? count_of(tile) / 8 * 8 : 0; }
  MODXFER_DEVICE static unsigned char* own(const Side& side, int i) {
    return side.own + i * size_of(side.kind);
  }

  MODXFER_DEVICE void read_side(const Side& side, int row, int i, int n, bool again,
                                Four& z) const {
    const bool has_come = again || i % kTile + n <= num_copied(i / kTile);
    if (kIsResident && has_come) {
      read_four(own(side, i), side.kind, true, n, z);
    } else {
      const unsigned char* from = side.at(row, begin_ + i);
      read_four(from, side.kind, is_aligned_, n, z);
      if (kIsResident) keep(side, from, i, n);
    }
    if (side.bend.bias != nullptr && !(kIsResident && again)) {
      Four bias;
      const float* from = side.bend.bias + begin_ + i;
      const bool is_aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
      read_four(reinterpret_cast<const unsigned char*>(from), Kind::kFloat, is_aligned, n, bias);
      MODXFER_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (k < n) z.of[k] += bias.of[k];
      }
      if (kIsResident) put_four(own(side, i), side.kind, true, n, z);
    }
    if (side.bend.is_straight()) return;
    MODXFER_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k < n) z.of[k] = bent(z.of[k], side.bend);
    }
  }

  MODXFER_DEVICE static void keep(const Side& side, const unsigned char* from, int i, int n) {
    MODXFER_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k >= n) break;
      if (side.kind == Kind::kFloat) {
        reinterpret_cast<float*>(own(side, i))[k] = reinterpret_cast<const float*>(from)[k];
      } else {
        reinterpret_cast<uint16_t*>(own(side, i))[k] = reinterpret_cast<const uint16_t*>(from)[k];
      }
    }
  }

  Side sides_[kSides];
  device::Barrier* full_;
  int begin_, size_;
  bool is_aligned_;
};

}  // namespace modxfer::cuda
