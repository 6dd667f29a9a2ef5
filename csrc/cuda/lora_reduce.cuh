// Partial sums added in their order and rounded once, of several results in one launch. Torch-free.
#pragma once

#include "fragments.cuh"

namespace modxfer::cuda {

constexpr int kMaxJobs = 16, kReduceThreads = 256;

template <class W>
struct ReduceJob {
  const float* parts;  // [count, size]
  W* out;              // [size]
  int64_t size;
  int count;
  int first_block;  // of blocks of kReduceThreads results
};

template <class W>
struct Reduce {
  int num_jobs;
  ReduceJob<W> jobs[kMaxJobs];
};

template <class W>
MODXFER_KERNEL void MODXFER_BOUNDS(kReduceThreads, 1) lora_reduce(MODXFER_ARGUMENT Reduce<W> of) {
  int index = 0;
  while (index + 1 < of.num_jobs && device::cluster_index() >= of.jobs[index + 1].first_block) {
    ++index;
  }
  const ReduceJob<W>& job = of.jobs[index];
  const int64_t block = device::cluster_index() - job.first_block;
  const int64_t i = block * kReduceThreads + device::thread_index();
  if (i >= job.size) return;
  float sum = 0.0f;
  // loads of several are under way at once
  MODXFER_UNROLL_BY_8
  for (int part = 0; part < job.count; ++part) sum += job.parts[part * job.size + i];
  job.out[i] = rounded<W>(sum);
}

}  // namespace modxfer::cuda
