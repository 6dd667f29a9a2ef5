// The CUDA rows of the projection loss on the emulator, as a library with C names.
#include "emulated.h"

#include "projection_loss_rows.cuh"

namespace {

using namespace modxfer;
using namespace modxfer::cuda;

template <ProjectionLoss kTerms>
auto kernel_of(int fours) {
  return fours == 4   ? projection_loss_rows<kTerms, 4>
         : fours == 8 ? projection_loss_rows<kTerms, 8>
                      : projection_loss_rows<kTerms, kStreamed>;
}

}  // namespace

extern "C" {

void emulator_schedule(uint64_t seed) { set_schedule(seed); }

const char* emulated_projection_loss(const ProjectionRows* rows, int fours, int threads) {
  const device::Grid grid{rows->rows, threads, 1, kProjectionBytes};
  return fault_of([&] {
    const bool is_smooth = rows->spec.loss == ProjectionLoss::kSmoothL1;
    device::launch(is_smooth ? kernel_of<ProjectionLoss::kSmoothL1>(fours)
                             : kernel_of<ProjectionLoss::kMse>(fours),
                   grid, *rows);
  });
}

// fours and threads
void planned_rows(int width, int* found) {
  const RowPlan plan = row_plan_of(width);
  found[0] = plan.fours;
  found[1] = plan.threads;
}

}  // extern "C"
