// Kernels for the emulator's own tests: each as it should be, and with faults planted.
//
//   emulator_kernels KERNEL FAULT SEEDS     prints a line for each seed, "ok HASH" or "fault TEXT"
//
// FAULT 0 is the kernel without one.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "device.cuh"

namespace {

using namespace modxfer::device;

constexpr int kThreads = 128, kTile = 256;  // floats

float* floats(int offset) { return reinterpret_cast<float*>(shared_memory()) + offset; }

// --- sums of rows through a warp, a block and a cluster

template <int kFault>
MODXFER_KERNEL void cluster_sum(const float* x, int width, float* sums) {
  float* part = floats(0);
  const int lane = thread_index() % 32, warp = thread_index() / 32, warps = block_size() / 32;
  const int row = cluster_index(), stride = block_size() * cluster_size();
  float sum = 0.0f;
  for (int i = cluster_rank() * block_size() + thread_index(); i < width; i += stride) {
    sum += x[row * width + i];
  }
  if constexpr (kFault == 1) {  // some lanes do not come
    if (lane < 16) sum += from_lane_xor(sum, 1);
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += from_lane_xor(sum, mask);
  if (lane == 0) part[kFault == 2 ? 2 * warp : warp] = sum;  // 2: beyond, or never written
  if constexpr (kFault == 3) {
    sync_warp();  // in the place of the block's
  } else if constexpr (kFault == 4) {
    if (warp > 0)
      sync_block();
    else
      sync_block();
  } else if constexpr (kFault == 5) {
    if (warp > 0) sync_block();
  } else {
    sync_block();
  }
  float total = 0.0f;
  if (thread_index() == 0) {
    for (int w = 0; w < warps; ++w) total += part[w];
    part[warps] = total;
  }
  if constexpr (kFault == 6) {
    sync_block();  // in the place of the cluster's
  } else {
    sync_cluster();
  }
  if (cluster_rank() == 0 && thread_index() == 0) {
    float all = 0.0f;
    for (int rank = 0; rank < cluster_size(); ++rank) all += *of_rank(part + warps, rank);
    sums[row] = all;
  }
  if constexpr (kFault != 7) sync_cluster();
}

// --- tiles by bulk copies through a ring of two, each with a barrier that it is full

template <int kFault>
MODXFER_KERNEL void ring(const float* x, int tiles, float* sums) {
  constexpr int kStages = 2, kBytes = kTile * sizeof(float);
  auto* full = reinterpret_cast<Barrier*>(floats(kStages * kTile));
  const bool leads = thread_index() == 0;
  const auto load = [&](int tile) {
    const int stage = tile % kStages;
    const int expected = kFault == 1 ? kBytes / 2 : kFault == 2 ? 2 * kBytes : kBytes;
    full[stage].arrive_expecting(expected);
    const int misaligned = kFault == 3 && tile == 1 ? 1 : 0;
    copy_bulk(floats(stage * kTile) + misaligned, x + tile * kTile, kBytes, full[stage]);
  };
  if (leads) {
    for (int stage = 0; stage < kStages; ++stage) {
      if (kFault != 4) full[stage].init(1);
    }
    fence_barriers();
  }
  if constexpr (kFault != 5) sync_block();
  if (leads) {
    for (int tile = 0; tile < kStages && tile < tiles; ++tile) load(tile);
  }
  float sum = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, phase = tile / kStages;
    if constexpr (kFault == 6) {
      full[stage].wait((phase & 1) ^ 1);  // the phase before
    } else if constexpr (kFault == 7) {
      full[(stage + 1) % kStages].wait(phase & 1);  // another tile's
    } else {
      full[stage].wait(phase & 1);
    }
    for (int i = thread_index(); i < kTile; i += block_size()) sum += floats(stage * kTile)[i];
    if constexpr (kFault != 8) sync_block();  // 8: overwritten while it is read
    if (leads && tile + kStages < tiles) {
      fence_copies();
      load(tile + kStages);
    }
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += from_lane_xor(sum, mask);
  if constexpr (kFault == 9) {
    if (thread_index() % 32 == 0) *sums += sum;  // not atomic
  } else {
    if (thread_index() % 32 == 0) sums[thread_index() / 32] = sum;
  }
}

// --- rows by asynchronous copies of 16 bytes, summed backwards

template <int kFault>
MODXFER_KERNEL void groups(const float* x, int tiles, float* sums) {
  const int i = 4 * thread_index();
  float sum = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    float* room = floats(tile % 2 * 4 * block_size());
    copy_async(room + i, x + (tile * 4 * block_size() + i));
    commit_async();
    if constexpr (kFault == 1) {
      wait_async<1>();  // which allows this one to be on its way
    } else if constexpr (kFault != 2) {
      wait_async<0>();
    }
    if constexpr (kFault != 3) sync_block();  // others copied what this thread reads
    for (int k = 0; k < 4; ++k) sum += room[4 * block_size() - 1 - (i + k)];
    // 4: the room is filled again while others read it; two rooms need one barrier a tile
    if constexpr (kFault == 4) room[0] = 0.0f;
  }
  sums[thread_index()] = sum;
}

// --- halves over the floats that they are made of

template <int kFault>
MODXFER_KERNEL void halves(float* row, int width) {
  auto* narrow = reinterpret_cast<Bf16*>(row);
  for (int begin = 0; begin < width; begin += block_size()) {
    const int i = begin + thread_index();
    const float value = i < width ? row[i] : 0.0f;
    if constexpr (kFault != 1) sync_block();
    if (i < width) narrow[i] = to_bf16(value);
  }
}

// --- a histogram, a vote, and a cluster that meets in two steps

template <int kFault>
MODXFER_KERNEL void histogram(const int* bins, int count, int* counts) {
  int* own = reinterpret_cast<int*>(shared_memory());
  for (int i = thread_index(); i < 16; i += block_size()) own[i] = 0;
  if constexpr (kFault != 1) sync_block();
  for (int i = thread_index(); i < count; i += block_size()) {
    if constexpr (kFault == 2) {
      own[bins[i]] += 1;
    } else {
      atomic_add(own + bins[i], 1);
    }
  }
  arrive_cluster();
  const uint32_t votes = ballot(thread_index() % 3 == 0);
  if constexpr (kFault != 3) wait_cluster();
  for (int i = thread_index(); i < 16; i += block_size()) {
    int all = 0;
    for (int rank = 0; rank < cluster_size(); ++rank) all += of_rank(own, rank)[i];
    if (cluster_rank() == 0) counts[i] = all + (votes == 0 ? 1 : 0);
  }
  if constexpr (kFault == 3) wait_cluster();
  sync_cluster();
}

// --- a scan that uses one room twice

template <int kFault>
MODXFER_KERNEL void twice(float* x) {
  float* room = floats(0);
  for (int shift = 1; shift < block_size(); shift *= 2) {
    room[thread_index()] = x[thread_index()];
    sync_block();
    const int from = thread_index() - shift;
    x[thread_index()] += from >= 0 ? room[from] : 0.0f;
    if constexpr (kFault != 1) sync_block();
  }
}

using Launch = void (*)(std::vector<unsigned char>&);

std::vector<float> numbers(int count) {
  std::vector<float> x(count);
  for (int i = 0; i < count; ++i) x[i] = static_cast<float>(i * 7 % 23) - 3.0f;
  return x;
}

template <class T>
void keep(std::vector<unsigned char>& out, const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  out.assign(bytes, bytes + values.size() * sizeof(T));
}

template <int kFault>
void run_cluster_sum(std::vector<unsigned char>& out) {
  const auto x = numbers(3 * 1000);
  std::vector<float> sums(3);
  launch(cluster_sum<kFault>, Grid{12, kThreads, 4, (kThreads / 32 + 1) * 4}, x.data(), 1000,
         sums.data());
  keep(out, sums);
}

template <int kFault>
void run_ring(std::vector<unsigned char>& out) {
  const auto x = numbers(7 * kTile);
  std::vector<float> sums(kThreads / 32);
  launch(ring<kFault>, Grid{1, kThreads, 1, 2 * kTile * 4 + 16}, x.data(), 7, sums.data());
  keep(out, sums);
}

template <int kFault>
void run_groups(std::vector<unsigned char>& out) {
  const auto x = numbers(5 * 4 * kThreads);
  std::vector<float> sums(kThreads);
  launch(groups<kFault>, Grid{1, kThreads, 1, 2 * 4 * kThreads * 4}, x.data(), 5, sums.data());
  keep(out, sums);
}

template <int kFault>
void run_halves(std::vector<unsigned char>& out) {
  auto row = numbers(500);
  launch(halves<kFault>, Grid{1, kThreads, 1, 0}, row.data(), 500);
  keep(out, row);
}

template <int kFault>
void run_histogram(std::vector<unsigned char>& out) {
  std::vector<int> bins(1000), counts(16);
  for (int i = 0; i < 1000; ++i) bins[i] = i * i % 16;
  launch(histogram<kFault>, Grid{2, kThreads, 2, 64}, bins.data(), 1000, counts.data());
  keep(out, counts);
}

template <int kFault>
void run_twice(std::vector<unsigned char>& out) {
  auto x = numbers(kThreads);
  launch(twice<kFault>, Grid{1, kThreads, 1, kThreads * 4}, x.data());
  keep(out, x);
}

// A read past the end of what the host gave.
template <int kFault>
MODXFER_KERNEL void past(const float* x, int count, float* sums) {
  const int i = thread_index();
  sums[i] = i < count + (kFault == 1 ? 1 : 0) ? x[i] : 0.0f;
}

template <int kFault>
void run_past(std::vector<unsigned char>& out) {
  const auto x = numbers(100);
  std::vector<float> sums(kThreads);
  launch(past<kFault>, Grid{1, kThreads, 1, 0}, x.data(), 100, sums.data());
  keep(out, sums);
}

const std::map<std::string, std::vector<Launch>> kRuns = {
    {"cluster_sum",
     {run_cluster_sum<0>, run_cluster_sum<1>, run_cluster_sum<2>, run_cluster_sum<3>,
      run_cluster_sum<4>, run_cluster_sum<5>, run_cluster_sum<6>, run_cluster_sum<7>}},
    {"ring",
     {run_ring<0>, run_ring<1>, run_ring<2>, run_ring<3>, run_ring<4>, run_ring<5>, run_ring<6>,
      run_ring<7>, run_ring<8>, run_ring<9>}},
    {"groups", {run_groups<0>, run_groups<1>, run_groups<2>, run_groups<3>, run_groups<4>}},
    {"halves", {run_halves<0>, run_halves<1>}},
    {"histogram", {run_histogram<0>, run_histogram<1>, run_histogram<2>, run_histogram<3>}},
    {"twice", {run_twice<0>, run_twice<1>}},
    {"past", {run_past<0>, run_past<1>}},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return EXIT_FAILURE;
  const Launch launch = kRuns.at(argv[1]).at(std::atoi(argv[2]));
  for (int seed = 0; seed < std::atoi(argv[3]); ++seed) {
    modxfer::emulator::schedule() = modxfer::emulator::Schedule::of(seed);
    try {
      std::vector<unsigned char> out;
      launch(out);
      uint64_t hash = 1469598103934665603u;  // FNV-1a
      for (unsigned char byte : out) hash = (hash ^ byte) * 1099511628211u;
      std::printf("ok %016llx\n", static_cast<unsigned long long>(hash));
    } catch (const modxfer::emulator::Fault& fault) {
      std::printf("fault %s\n", fault.what());
    }
  }
  return EXIT_SUCCESS;
}
