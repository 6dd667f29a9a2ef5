// How many threads share a row of hidden states. Torch-free, and free of CUDA.
#pragma once

namespace modxfer::cuda {

constexpr int kMostRowThreads = 512;

struct RowPlan {
  int fours;  // of each side in a thread's registers, or 0: the row is read in each pass
  int threads;
};

// 16 elements of both sides a thread leave a multiprocessor room for 1024 threads, and memory has
// the rows of some blocks under way while others are summed; wide rows take 32.
inline RowPlan row_plan_of(int width) {
  for (int fours : {4, 8}) {
    const int threads = (width + 4 * fours - 1) / (4 * fours);
    if (threads <= kMostRowThreads) return {fours, (threads + 31) / 32 * 32};
  }
  return {0, kMostRowThreads};
}

}  // namespace modxfer::cuda
