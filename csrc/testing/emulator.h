// A CUDA device on the host: what csrc/cuda/device.cuh is where a C++ compiler reads a kernel.
//
// Threads are fibers, and the blocks of a cluster run together; clusters run one after another.
// A thread runs until it waits for others, and a seed chooses who goes on: what a kernel leaves
// open to chance differs between seeds, and a correct kernel has the same bits with all of them.
// Copies that a kernel starts and does not wait for land late with some seeds.
//
// Found in every build: threads that wait for ever, barriers and warp operations that not all
// threads reach, reads of shared memory that nobody wrote (its values are NaN), copies that are
// misaligned, barriers of which more is expected than comes. Built with -fsanitize=thread, whose
// calls checker.cpp answers in the place of its library, also: two accesses to a byte that nothing
// orders, reads of shared memory before a write, accesses beyond it.
//
// Not modelled: the bits of approximate functions, in which order tensor cores add and how they
// round, memory that is weaker than barriers say, bank conflicts, occupancy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#define MODXFER_DEVICE inline
#define MODXFER_BOTH inline
#define MODXFER_KERNEL static
#define MODXFER_BOUNDS(threads, blocks)
#define MODXFER_UNROLL
#define MODXFER_UNROLL_BY_8
#define MODXFER_ARGUMENT const

namespace modxfer::emulator {

constexpr int kWarp = 32;

// A place in a kernel.
struct Site {
  const char* file;
  int line;
};

// What a launch asks for; blocks is a multiple of cluster, threads one of 32.
struct Grid {
  int blocks;
  int threads;
  int cluster;
  int shared_bytes;
};

// What a kernel did wrong.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// How the next launches run: who goes on, when copies land, and what lies in shared memory.
struct Schedule {
  enum class Order { kFirst, kLast, kRandom } order = Order::kFirst;
  uint64_t seed = 0;
  bool copies_land_late = false;
  unsigned char fill = 0xFF;  // of its bytes, NaN; 0x7F is a large number

  static Schedule of(uint64_t seed);
};
Schedule& schedule();

// Runs `kernel` once in each thread of the grid. Throws Fault.
void run(const Grid& grid, const std::function<void()>& kernel);

// Of the thread that runs now.
int thread_index();
int block_index();
int cluster_rank();
const Grid& grid();
unsigned char* shared_memory();

void wait_block(Site site);
void wait_cluster(Site site, bool arrives, bool waits);
void wait_warp(Site site);
// Gives each lane what all lanes brought: 32 values.
const uint64_t* exchange(uint64_t value, Site site);
void* of_rank(void* shared, int rank, Site site);

void barrier_init(uint64_t* barrier, int arrivals, Site site);
void barrier_arrive(uint64_t* barrier, int64_t bytes, Site site);
void barrier_wait(uint64_t* barrier, int parity, Site site);
void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, Site site);
void copy_async(void* shared, const void* global, int bytes, Site site);
void commit_async();
void wait_async(int groups_left, Site site);

// Between these two the accesses of the thread are atomic.
void begin_atomic();
void end_atomic();

}  // namespace modxfer::emulator

#include "tensor_core.h"

namespace modxfer::device {

using emulator::Grid;
using emulator::Site;

#define MODXFER_SITE Site site = {__builtin_FILE(), __builtin_LINE()}

inline int thread_index() { return emulator::thread_index(); }
inline int block_size() { return emulator::grid().threads; }
inline int cluster_rank() { return emulator::cluster_rank(); }
inline int cluster_size() { return emulator::grid().cluster; }
inline int cluster_index() { return emulator::block_index() / cluster_size(); }
inline int num_clusters() { return emulator::grid().blocks / cluster_size(); }

// The dynamic shared memory of the block, aligned to 128 bytes.
inline unsigned char* shared_memory() { return emulator::shared_memory(); }

inline void sync_warp(MODXFER_SITE) { emulator::wait_warp(site); }
inline void sync_block(MODXFER_SITE) { emulator::wait_block(site); }
inline void sync_cluster(MODXFER_SITE) { emulator::wait_cluster(site, true, true); }
inline void arrive_cluster(MODXFER_SITE) { emulator::wait_cluster(site, true, false); }
inline void wait_cluster(MODXFER_SITE) { emulator::wait_cluster(site, false, true); }

template <class T>
T from_lane(T value, int lane, MODXFER_SITE) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  std::memcpy(&value, emulator::exchange(bits, site) + lane % emulator::kWarp, sizeof(T));
  return value;
}

// Of the lane whose number differs in the bits of `mask`.
template <class T>
T from_lane_xor(T value, int mask, MODXFER_SITE) {
  return from_lane(value, (thread_index() % emulator::kWarp) ^ mask, site);
}

// Bit i is the vote of lane i.
inline uint32_t ballot(bool vote, MODXFER_SITE) {
  const uint64_t* votes = emulator::exchange(vote, site);
  uint32_t mask = 0;
  for (int lane = 0; lane < emulator::kWarp; ++lane) mask |= uint32_t{votes[lane] != 0} << lane;
  return mask;
}

// The same variable of another block of the cluster.
template <class T>
T* of_rank(T* shared, int rank, MODXFER_SITE) {
  return static_cast<T*>(
      emulator::of_rank(const_cast<void*>(static_cast<const void*>(shared)), rank, site));
}

// A barrier in shared memory that counts arrivals and bytes; its phases alternate in parity.
struct Barrier {
  uint64_t state;

  void init(int arrivals, MODXFER_SITE) { emulator::barrier_init(&state, arrivals, site); }
  void arrive(MODXFER_SITE) { emulator::barrier_arrive(&state, 0, site); }
  // Arrives, and the phase lasts until so many bytes more have come.
  void arrive_expecting(int bytes, MODXFER_SITE) { emulator::barrier_arrive(&state, bytes, site); }
  // Until a phase of this parity has ended; the first has parity 0.
  void wait(int parity, MODXFER_SITE) { emulator::barrier_wait(&state, parity, site); }
};

// Makes initialised barriers visible to copies and to the cluster; a barrier of threads follows.
inline void fence_barriers() {}
// Before copies overwrite what threads have read or written; a barrier of threads stands between.
inline void fence_copies() {}

// shared = global, both aligned to 16 bytes and so many of them; the barrier is told.
inline void copy_bulk(void* shared, const void* global, int bytes, Barrier& barrier, MODXFER_SITE) {
  emulator::copy_bulk(shared, global, bytes, &barrier.state, site);
}

// shared = global, 16 bytes, complete after `wait_async` of its group, for this thread alone.
inline void copy_async(void* shared, const void* global, MODXFER_SITE) {
  emulator::copy_async(shared, global, 16, site);
}
inline void commit_async() { emulator::commit_async(); }
template <int kGroupsLeft>
void wait_async(MODXFER_SITE) {
  emulator::wait_async(kGroupsLeft, site);
}

template <class T>
T atomic_add(T* target, T value) {
  emulator::begin_atomic();
  const T before = *target;
  *target = before + value;
  emulator::end_atomic();
  return before;
}

template <class T>
T atomic_max(T* target, T value) {
  emulator::begin_atomic();
  const T before = *target;
  *target = before > value ? before : value;
  emulator::end_atomic();
  return before;
}

inline float log(float x) { return std::log(x); }
inline float log1p(float x) { return std::log1p(x); }
inline float exp(float x) { return std::exp(x); }
inline float sqrt(float x) { return std::sqrt(x); }
// The one that is not above x, a normal number.
inline float power_of_2(float x) { return std::exp2(static_cast<float>(std::ilogb(x))); }
// a b, rounded: never part of a fused multiply-add.
inline float product(float a, float b) { return a * b; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }

// Rounds to nearest even, as conversion does on a device; a NaN stays one.
struct Bf16 {
  uint16_t bits;
};
inline Bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
using Half = _Float16;
inline Half to_half(float x) { return static_cast<Half>(x); }
inline float to_float(Half x) { return static_cast<float>(x); }
inline float to_float(Bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The nearest number of tf32, halves away from 0; bits below it are not read.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  return std::isfinite(x) ? (bits + 0x1000) & 0xFFFFE000 : bits;
}
inline float from_tf32(uint32_t bits) { return float_of(bits & 0xFFFFE000); }

// A half-precision number from its bits, and back.
inline float from_bits(uint16_t bits, bool is_bf16) {
  if (is_bf16) return to_float(Bf16{bits});
  Half half;
  std::memcpy(&half, &bits, sizeof(half));
  return to_float(half);
}

inline uint16_t to_bits(float x, bool is_bf16) {
  if (is_bf16) return to_bf16(x).bits;
  const Half half = to_half(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}

inline uint64_t multiply_wide(uint32_t x, uint32_t y) { return uint64_t{x} * y; }

// 0xFFFF in the lower half where the first is below 0, in the upper half where the second is.
inline uint32_t negative_halves(int low, int high) {
  return (low < 0 ? 0x0000FFFFu : 0u) | (high < 0 ? 0xFFFF0000u : 0u);
}

// c += a b of a warp, a [16, 16] and b [16, 8] of T in the fragments of PTX's mma.m16n8k16.
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MODXFER_SITE) {
  emulator::multiply_add<16>(c, a, b, site, [](uint32_t pair, int i) {
    return from_bits(static_cast<uint16_t>(pair >> 16 * i), std::is_same_v<T, Bf16>);
  });
}

// a [16, 8] and b [8, 8] of tf32, floats of 10 bits behind the point, in those of mma.m16n8k8.
inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              MODXFER_SITE) {
  emulator::multiply_add<8>(c, a, b, site, [](uint32_t bits, int) { return from_tf32(bits); });
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, Arguments... arguments) {
  emulator::run(grid, [=] { kernel(arguments...); });
}

}  // namespace modxfer::device
