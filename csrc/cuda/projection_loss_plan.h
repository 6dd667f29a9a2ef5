// How many threads share a row of hidden states. Torch-free, and free of CUDA.
#pragma once

namespace modxfer::cuda {

constexpr int kMostRowThreads = 512;

struct RowPlan {
  int fours;  // of each side in a thread's registers, or 0: the row is read in each pass
  int threads;
};

// 16 elements of both sides a thread, and 32 where four warps are left: a thread's sums and
// addresses are then shared by more elements. Either way a multiprocessor has rows of 64 KiB of
// halves under way. A prediction from the instructions, 40 and 31 a pair of elements behind an RMS
// norm, until it is measured.
inline RowPlan row_plan_of(int width) {
  const int fours = width < 4096 ? 4 : 8, threads = (width + 4 * fours - 1) / (4 * fours);
  if (threads > kMostRowThreads) return {0, kMostRowThreads};
  return {fours, (threads + 31) / 32 * 32};
}

}  // namespace modxfer::cuda
