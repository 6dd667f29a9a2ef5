// How many blocks share a row. Torch-free, and free of CUDA.
#pragma once

#include <algorithm>

namespace modxfer::cuda {

// Of a cluster. More are not portable, and no device with clusters refuses as many.
constexpr int kMaxBlocks = 8;

struct Plan {
  bool is_resident;
  int cluster;
  int threads;
  int blocks = 0;
};

// Of a multiprocessor; bytes of shared memory that it keeps of every block it has, and no block may
// have them.
constexpr int kRegisters = 65536, kKeptOfABlock = 1024;
constexpr int kFewestThreads = 256;  // of a block

// Threads of a block where so many blocks are at once on a multiprocessor, as its registers allow.
inline int threads_of(int at_once, int registers) {
  constexpr int kMost[] = {512, 384, 256};
  constexpr int kWarpsTogether = 4 * 32;  // one for each part of a multiprocessor
  const int each = (registers + 7) / 8 * 8;
  return std::min(kRegisters / (at_once * each) / kWarpsTogether * kWarpsTogether,
                  kMost[at_once - 1]);
}

// Blocks that are on the device from the first row to the last: one that waits for another to end
// would have all its rows before it.
template <class AtOnce>
Plan filled(Plan plan, int rows, const AtOnce& clusters_at_once) {
  plan.blocks = std::min(rows, clusters_at_once(plan)) * plan.cluster;
  return plan;
}

// Of a kernel that reads rows from memory in each step.
template <class AtOnce>
Plan streamed_plan_of(int rows, const AtOnce& clusters_at_once) {
  return filled({false, 1, kFewestThreads}, rows, clusters_at_once);
}

// most_shared: bytes of shared memory that a block may have, 0 of a device without clusters;
// bytes_of(cluster): those that a block of so large a cluster needs to hold its part of a row;
// registers: of a thread of the kernel that holds rows; clusters_at_once(plan): that the device
// runs, 0 where it runs none.
//
// A multiprocessor that holds several blocks loads the row of one while it computes another's: the
// smallest cluster that leaves room for three, or two, or else fits.
template <class Bytes, class AtOnce>
Plan plan_of(int rows, int most_shared, int registers, const Bytes& bytes_of,
             const AtOnce& clusters_at_once) {
  for (int at_once : {3, 2, 1}) {
    const int threads = threads_of(at_once, registers);
    if (threads < kFewestThreads) continue;
    const int share = (most_shared + kKeptOfABlock) / at_once - kKeptOfABlock;
    for (int cluster = 1; cluster <= kMaxBlocks; cluster *= 2) {
      if (bytes_of(cluster) > share) continue;
      const Plan plan = filled({true, cluster, threads}, rows, clusters_at_once);
      if (plan.blocks > 0) return plan;
    }
  }
  return streamed_plan_of(rows, clusters_at_once);
}

// Of each row a kernel may have so many classes in shared memory beside what else a block needs.
struct List {
  int count = 0, bytes_each = 0;
};

// How long the list may be where a block needs `bytes` with this one.
inline int most_listed(const List& list, int bytes, int most_shared) {
  if (bytes <= most_shared) return list.count;
  return list.count - (bytes - most_shared + list.bytes_each - 1) / list.bytes_each;
}

}  // namespace modxfer::cuda
