// The CUDA passes of LoRA linears on the emulator, as a library with C names.
#include "emulated.h"
#include "lora_passes.h"

namespace {

using namespace modxfer::cuda;

const auto launch = [](auto kernel, const modxfer::device::Grid& grid, const auto& arguments) {
  modxfer::device::launch(kernel, grid, arguments);
};

template <class T>
std::vector<T> listed(const T* first, int count) {
  return {first, first + count};
}

}  // namespace

extern "C" {

void emulator_schedule(uint64_t seed) { set_schedule(seed); }

const char* emulated_shrink(const ShrinkCall* call, const ShrinkTarget* targets, int count,
                            const Gpu* gpu) {
  return fault_of([&] { shrink(*call, listed(targets, count), *gpu, launch); });
}

const char* emulated_ds_db(const DsDbCall* call, const DyTarget* targets, int count, const Gpu*) {
  return fault_of([&] { ds_db(*call, listed(targets, count), launch); });
}

const char* emulated_da(const DaCall* call, const DaTarget* targets, int count, const Gpu* gpu) {
  return fault_of([&] { da(*call, listed(targets, count), *gpu, launch); });
}

const char* emulated_reduce(const Kind* adapters, const Parts* parts, int count, const Gpu*) {
  return fault_of([&] { reduce(*adapters, listed(parts, count), launch); });
}

int place(int size, int rows, int row, int chunk) {
  return size == 4 ? place_of<float>(rows, row, chunk)
                   : place_of<modxfer::device::Bf16>(rows, row, chunk);
}

// The bytes of shared memory that a block of any pass may need: the most of all types and ranks.
int most_shared_bytes() {
  int most = 0;
  const auto of = [&](auto x, auto w, auto tiles) {
    using X = typename decltype(x)::type;
    using W = typename decltype(w)::type;
    constexpr int kTiles = decltype(tiles)::value;
    const int bytes[] = {kStages * shrink_stage_bytes<X, W, kTiles>(64, 1),
                         kDsDbOwnBytes<W, kTiles> + kStages * kDsDbStageBytes<X, W, kTiles>,
                         kStages * da_stage_bytes<X, W, kTiles>(1)};
    for (int each : bytes) most = std::max(most, each);
  };
  const std::pair<Kind, Kind> types[] = {
      {Kind::kBf16, Kind::kBf16}, {Kind::kBf16, Kind::kFloat}, {Kind::kFloat, Kind::kFloat}};
  for (const auto& [x, adapters] : types) {
    for (int rank : {16, 32, 64})
      with_kernel(x, adapters, std::vector<DaTarget>{{{}, {}, rank}}, of);
  }
  return most;
}

}  // extern "C"
