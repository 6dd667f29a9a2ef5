// The CUDA rows of the KD loss and of the cross entropy on the emulator, as a library with C names.
#include "emulated.h"

#include "cross_entropy_rows.cuh"
#include "kd_loss_plan.h"
#include "kd_loss_rows.cuh"

namespace {

using namespace modxfer;
using namespace modxfer::cuda;

template <bool kIsResident, int64_t kId = 0>
void launch_divergence(const device::Grid& grid, const KdRows& rows) {
  if constexpr (kId == kNumSums) {
    device::launch(kd_loss_rows<Divergence::kCount, kIsResident>, grid, rows);
  } else if (static_cast<int64_t>(rows.spec.divergence) == kId) {
    device::launch(kd_loss_rows<static_cast<Divergence>(kId), kIsResident>, grid, rows);
  } else {
    launch_divergence<kIsResident, kId + 1>(grid, rows);
  }
}

}  // namespace

extern "C" {

void emulator_schedule(uint64_t seed) { set_schedule(seed); }

const char* emulated_kd_loss(const KdRows* rows, int blocks, int cluster, int threads,
                             bool is_resident) {
  const device::Grid grid{blocks, threads, cluster,
                          shared_bytes(rows->classes, cluster, rows->logits, is_resident)};
  return fault_of([&] {
    is_resident ? launch_divergence<true>(grid, *rows) : launch_divergence<false>(grid, *rows);
  });
}

const char* emulated_cross_entropy(const KdRows* rows, int blocks, int cluster, int threads,
                                   bool is_resident) {
  const int bytes = cross_entropy_shared_bytes(rows->classes, cluster, rows->logits, is_resident);
  const device::Grid grid{blocks, threads, cluster, bytes};
  return fault_of([&] {
    const auto kernel = is_resident ? cross_entropy_rows<true> : cross_entropy_rows<false>;
    device::launch(kernel, grid, *rows);
  });
}

// is_resident, cluster, blocks, threads and the bytes of a block.
void planned_kd_loss(int rows, int classes, int logit_bytes, int multiprocessors, int most_shared,
                     int* found) {
  const Kind kind = logit_bytes == 4 ? Kind::kFloat : Kind::kBf16;
  const Plan plan = plan_of(rows, multiprocessors, most_shared, [&](int cluster) {
    return shared_bytes(classes, cluster, kind, true);
  });
  const int bytes = shared_bytes(classes, plan.cluster, kind, plan.is_resident);
  const int all[] = {plan.is_resident, plan.cluster, plan.blocks, plan.threads, bytes};
  for (int value : all) *found++ = value;
}

}  // extern "C"
