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

}  // extern "C"
