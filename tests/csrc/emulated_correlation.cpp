// The CUDA kernels of the correlation on the emulator, as a library with C names.
#include "emulated.h"

#include "correlation_rows.cuh"

using namespace modxfer::cuda;
namespace device = modxfer::device;

extern "C" {

void emulator_schedule(uint64_t seed) { set_schedule(seed); }

int correlation_centre_blocks(int rows) { return num_rows_of_blocks(rows); }

const char* emulated_correlation_centre(const CentreRows* of) {
  const int blocks = num_rows_of_blocks(of->rows) * num_columns_of_blocks(of->width);
  return fault_of([&] {
    device::launch(correlation_centre_rows, {blocks, kCentreWarps * 32, 1, kCentreBytes}, *of);
  });
}

const char* emulated_correlation_add(const AddTile* of) {
  const int blocks = of->rows * num_blocks_a_row(of->width);
  return fault_of([&] { device::launch(correlation_add_tile, {blocks, kAddThreads, 1, 0}, *of); });
}

}  // extern "C"
