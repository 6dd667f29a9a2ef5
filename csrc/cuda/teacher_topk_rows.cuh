// The K largest logits of a teacher's rows and the mass of the rest, a cluster of blocks a row.
// Torch-free; kernels/linear_kd_loss/teacher_topk.py says what is found.
//
//   load     as of kd_loss_rows.cuh, of one side
//   stats    maximum and sum of e^x, as tiles come; of each thread its largest logit   one exchange
//   select   an interval of keys that begins at the K-th largest one                one a histogram
//   collect  the K of the interval; the others' sum of e^x; room for the next row's tiles      one
//
// A key is a logit above its class, so that no two are equal. The interval first reaches from the
// smallest of the threads' maxima, which as many logits as threads are not below, to the row's:
// next to no logit lies in it. A histogram of it in 256 buckets, added up over the blocks' shared
// memory, says which bucket holds the K-th largest key, and that bucket is the next interval, until
// it holds nothing but wanted keys: two histograms mostly, 8 at most. Integers are added up and
// each thread has the same logits in each pass, so that no schedule changes a bit. A key's rank
// among the K is how many of them are larger.
#pragma once

#include "softmax.cuh"

namespace modxfer::cuda {

struct TeacherTopKRows {
  const void* logits;  // [rows, classes] of `kind`, rows so many elements apart
  int64_t stride;
  Kind kind;
  Bend bend;
  float inv_temperature;
  int rows, classes, count;
  int32_t* ids;      // [rows, count]
  float* log_probs;  // [rows, count]
  float* log_tail;   // [rows]
};

using Key = uint64_t;
constexpr int kBuckets = 256;

MODXFER_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// In the order of floats; -0 is 0.
MODXFER_DEVICE uint32_t ordered(float x) {
  const uint32_t bits = bits_of(x + 0.0f);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

MODXFER_DEVICE Key key_of(float logit, int i) {
  return Key{ordered(logit)} << 32 | ~static_cast<uint32_t>(i);
}

MODXFER_DEVICE int class_of(Key key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

MODXFER_DEVICE float logit_of(Key key) {
  const uint32_t high = static_cast<uint32_t>(key >> 32);
  const uint32_t bits = high ^ (high >> 31 ? 0x80000000u : 0xFFFFFFFFu);
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// Keys from `low` on to `high`, of which the `wanted` largest are; 0: all of them.
struct Interval {
  Key low, high;
  uint64_t wanted;

  // Of a bucket.
  MODXFER_DEVICE int shift() const {
    int bits = 0;
    while ((high - low) >> bits >= kBuckets) ++bits;
    return bits;
  }
};

struct alignas(16) TeacherTopKRoom {
  SoftmaxRoom<1> softmax;
  float warps[kMaxWarps * 2], tops[2][kMaxBlocks * 2], rests[kMaxBlocks];
  uint32_t counts[2][kBuckets];  // of this block, of every second histogram apart
  uint32_t sums[kBuckets];       // of the cluster
  Interval interval;
  uint32_t num_own;  // keys of this block
};

// Of a class in the list of a row: a key among the block's own, and one among the row's.
constexpr int kFoundListBytes = 2 * sizeof(Key);

// The bytes of shared memory that a block needs.
inline int teacher_topk_shared_bytes(int classes, int count, int blocks, Kind kind,
                                     bool is_resident) {
  return static_cast<int>(sizeof(TeacherTopKRoom)) + kFoundListBytes * count +
         (is_resident ? slices_bytes(1, classes, blocks, kind) : 0);
}

// One warp finds the bucket that holds the last wanted key of an interval, the next interval: lane
// by lane eight buckets, the largest keys in those of the last lane. `above` are the keys of larger
// buckets; what they leave of `wanted` the bucket has to give, and 0 says that it gives all it has.
MODXFER_DEVICE void narrow(const uint32_t* sums, int shift, const Interval& interval,
                           Interval& next) {
  constexpr int kEach = kBuckets / kLanes;
  const int lane = device::thread_index();
  uint64_t own = 0;
  for (int i = 0; i < kEach; ++i) own += sums[lane * kEach + i];
  uint64_t above = own;  // keys of this lane's buckets, then of larger ones too
  for (int step = 1; step < kLanes; step *= 2) {
    const uint64_t more = device::from_lane(above, lane + step < kLanes ? lane + step : lane);
    if (lane + step < kLanes) above += more;
  }
  const uint64_t wanted = interval.wanted, all = device::from_lane(above, 0);
  above -= own;
  if (lane == 0 && all <= wanted) next.wanted = 0;
  if (above >= wanted || above + own < wanted || all <= wanted) return;
  int bucket = (lane + 1) * kEach - 1;
  for (; above + sums[bucket] < wanted; --bucket) above += sums[bucket];
  const Key span = (Key{1} << shift) - 1;
  next.low = interval.low + (static_cast<Key>(bucket) << shift);
  next.high = interval.high - next.low > span ? next.low + span : interval.high;
  next.wanted = above + sums[bucket] == wanted ? 0 : wanted - above;
}

template <bool kIsResident>
MODXFER_KERNEL void teacher_topk_rows(MODXFER_ARGUMENT TeacherTopKRows rows) {
  unsigned char* memory = device::shared_memory();
  auto& room = *reinterpret_cast<TeacherTopKRoom*>(memory);
  const Side teacher[] = {{rows.logits, rows.stride, rows.kind, Bend{}}};
  Sides<1, kIsResident> sides(teacher, rows.classes, memory += sizeof(room));
  if (kIsResident) memory += slices_bytes(1, rows.classes, device::cluster_size(), rows.kind);
  Key* own = reinterpret_cast<Key*>(memory);
  Key* all = own + rows.count;
  const int thread = device::thread_index(), size = device::block_size();
  const int blocks = device::cluster_size();
  const float rate = rows.inv_temperature * kLog2E;
  const bool bends = !rows.bend.is_identity(), leads = thread == 0 && device::cluster_rank() == 0;
  const auto z_of = [&](float logit) { return bends ? bent(logit, rows.bend) : logit; };
  // body(key, logit) for each class of a tile that was read before
  const auto for_each_key = [&](int row, int tile, const auto& body) {
    sides.for_each_four(tile, [&](int i, int n) {
      Four logits[1];
      sides.read(row, i, n, true, logits);
      MODXFER_UNROLL
      for (int k = 0; k < 4; ++k) {
        if (k < n) body(key_of(logits->of[k], sides.begin() + i + k), logits->of[k]);
      }
    });
  };
  const auto put = [&](int row, int rank, int id, float log_prob) {
    const int64_t at = static_cast<int64_t>(row) * rows.count + rank;
    rows.ids[at] = id;
    rows.log_probs[at] = log_prob;
  };
  sides.start(rows.rows);
  int turn = 0, histogram = 0;
  for (int row = device::cluster_index(); row < rows.rows; row += device::num_clusters(), ++turn) {
    // --- stats
    Softmax parts[1];
    float top = -kInf;
    for (int tile = 0; tile < sides.num_tiles(); ++tile) {
      sides.wait(tile, turn);
      sides.for_each_four(tile, [&](int i, int n) {
        Four z[1];
        sides.read(row, i, n, false, z);
        MODXFER_UNROLL
        for (int k = 0; k < 4; ++k) {
          top = vmax(z->of[k], top);  // past the end they are -inf
          z->of[k] = z_of(z->of[k]);
        }
        parts->add(*z, (1u << n) - 1, rate, false, false);
      });
    }
    float tops[2] = {top, -top};
    reduce_block<true, 2>(tops, room.warps);
    tell<2>(tops, room.tops[turn & 1]);
    reduce_row(parts, rate, turn, room.softmax);
    for (int rank = 0; rank < blocks; ++rank) {
      for (int i = 0; i < 2; ++i) tops[i] = vmax(room.tops[turn & 1][2 * rank + i], tops[i]);
    }
    const Softmax& p = parts[0];
    if (!(p.d > 0.0f && p.d < kInf)) {  // of a row without a softmax
      for (int tile = 0; tile < sides.num_tiles(); ++tile) sides.refill(tile, row, rows.rows);
      if (device::cluster_rank() > 0) continue;
      constexpr float nan = __builtin_nanf("");
      for (int i = thread; i < rows.count; i += size) put(row, i, i, nan);
      if (leads) rows.log_tail[row] = nan;
      continue;
    }
    const float log_d = device::log(p.d);

    // --- select: `interval` holds the K-th largest key, and so many of its largest keys are wanted
    if (thread == 0) {
      // as many logits as there are threads are at least the smallest of their maxima, `least`
      const float least = rows.count <= blocks * size ? vmax(-tops[1], kNoTop) : kNoTop;
      room.interval = {Key{ordered(least)} << 32, key_of(tops[0], 0),
                       static_cast<uint64_t>(rows.count)};
      room.num_own = 0;
    }
    while (true) {
      // this block's histogram of the interval; other blocks may still read the one before it
      uint32_t* counts = room.counts[histogram++ & 1];
      for (int i = thread; i < kBuckets; i += size) counts[i] = 0;
      device::sync_block();
      const Interval interval = room.interval;
      if (interval.wanted == 0) break;  // all of its keys are, and all above it
      const int shift = interval.shift();
      for (int tile = 0; tile < sides.num_tiles(); ++tile) {
        for_each_key(row, tile, [&](Key key, float) {
          if (key < interval.low || key > interval.high) return;
          device::atomic_add(counts + ((key - interval.low) >> shift), 1u);
        });
      }
      device::sync_cluster();
      // the histogram of the whole row, each block for itself, and the bucket to look into next
      for (int i = thread; i < kBuckets; i += size) {
        uint32_t sum = 0;
        for (int rank = 0; rank < blocks; ++rank) sum += device::of_rank(counts, rank)[i];
        room.sums[i] = sum;
      }
      device::sync_block();
      if (thread < kLanes) narrow(room.sums, shift, interval, room.interval);
    }

    // --- collect
    const Key low = room.interval.low;
    float rest[1] = {0.0f};
    for (int tile = 0; tile < sides.num_tiles(); ++tile) {
      for_each_key(row, tile, [&](Key key, float logit) {
        if (key >= low) {
          own[device::atomic_add(&room.num_own, 1u)] = key;
        } else {
          rest[0] += device::exp2_approx((z_of(logit) - p.top) * rate);
        }
      });
      sides.refill(tile, row, rows.rows);
    }
    reduce_block<false, 1>(rest, room.warps);
    exchange<1>(rest, room.rests);
    int found = 0;
    for (int rank = 0; rank < blocks; ++rank) {
      const int theirs = static_cast<int>(*device::of_rank(&room.num_own, rank));
      const Key* from = device::of_rank(own, rank);
      for (int i = thread; i < theirs; i += size) all[found + i] = from[i];
      found += theirs;
    }
    device::sync_block();
    for (int i = thread; i < static_cast<int>(room.num_own); i += size) {
      const Key key = own[i];
      int rank = 0;
      for (int j = 0; j < found; ++j) rank += all[j] > key;
      put(row, rank, class_of(key), (z_of(logit_of(key)) - p.top) * rows.inv_temperature - log_d);
    }
    if (device::cluster_rank() > 0) continue;
    for (int i = found + thread; i < rows.count; i += size) put(row, i, -1, -kInf);
    if (leads) {
      float others = 0.0f;
      for (int rank = 0; rank < blocks; ++rank) others += room.rests[rank];
      rows.log_tail[row] = device::log(others) - log_d;
    }
  }
  device::sync_cluster();  // a block's keys are read before it ends
}

}  // namespace modxfer::cuda
