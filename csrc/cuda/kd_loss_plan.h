// How many blocks share a row. Torch-free, and free of CUDA.
#pragma once

#include <algorithm>

namespace modxfer::cuda {

struct Plan {
  bool is_resident;
  int cluster;
  int blocks;
  int threads;
};

// most_shared: bytes of shared memory that a block may have, 0 of a device without clusters;
// room: what it needs beside its slices of both rows.
//
// A multiprocessor that holds two blocks or more loads the row of one while it computes another's:
// the smallest cluster that leaves room for so many, else the smallest that fits. Clusters of more
// than 8 are not portable, and no device with clusters refuses 8.
inline Plan plan_of(int rows, int classes, int logit_bytes, int multiprocessors, int most_shared,
                    int room) {
  constexpr int kThreads = 512, kMostBlocks = 8;
  const auto needs = [&](int cluster) {
    const int slice = ((classes + cluster - 1) / cluster + 7) / 8 * 8;
    return room + 2 * slice * logit_bytes + 8 * (slice / 2048 + 1);
  };
  for (int share : {3, 1}) {
    for (int cluster = 1; cluster <= kMostBlocks; cluster *= 2) {
      if (needs(cluster) > most_shared / share) continue;
      const int clusters = std::min(rows, std::max(multiprocessors * share / cluster, 1));
      return {true, cluster, clusters * cluster, kThreads};
    }
  }
  return {false, 1, std::min(rows, multiprocessors * 4), kThreads};
}

}  // namespace modxfer::cuda
