// How many blocks share a row. Torch-free, and free of CUDA.
#pragma once

#include <algorithm>

namespace modxfer::cuda {

// Of a cluster. More are not portable, and no device with clusters refuses as many.
constexpr int kMaxBlocks = 8;

struct Plan {
  bool is_resident;
  int cluster;
  int blocks;
  int threads;
};

// Bytes of shared memory that a multiprocessor keeps of every block it has; no block may have them.
constexpr int kKeptOfABlock = 1024;

// most_shared: bytes of shared memory that a block may have, 0 of a device without clusters;
// bytes_of: those that a block of so large a cluster needs to hold its part of a row.
//
// A multiprocessor that holds several blocks loads the row of one while it computes another's: the
// smallest cluster that leaves room for three, or two, or else fits. Its 65536 registers are enough
// for as many threads of up to 80.
template <class Bytes>
Plan plan_of(int rows, int multiprocessors, int most_shared, const Bytes& bytes_of) {
  constexpr int kThreads[] = {512, 384, 256};  // of one to three blocks
  for (int at_once : {3, 2, 1}) {
    for (int cluster = 1; cluster <= kMaxBlocks; cluster *= 2) {
      const int share = (most_shared + kKeptOfABlock) / at_once - kKeptOfABlock;
      if (bytes_of(cluster) > share) continue;
      const int clusters = std::min(rows, std::max(multiprocessors * at_once / cluster, 1));
      return {true, cluster, clusters * cluster, kThreads[at_once - 1]};
    }
  }
  return {false, 1, std::min(rows, multiprocessors * 3), kThreads[2]};
}

}  // namespace modxfer::cuda
