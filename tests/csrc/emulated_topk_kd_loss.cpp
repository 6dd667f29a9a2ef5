// The CUDA rows of the KD loss against a teacher that lists a few classes, on the emulator, as a
// library with C names.
#include "emulated.h"

#include "topk_kd_loss_rows.cuh"

namespace {

using namespace modxfer;
using namespace modxfer::cuda;

template <bool kIsResident, int64_t kId = 0>
void launch_divergence(const device::Grid& grid, const TopKRows& rows) {
  if constexpr (is_of_logits(static_cast<Divergence>(kId))) {
    device::launch(topk_kd_loss_rows<Divergence::kCount, kIsResident>, grid, rows);
  } else if (static_cast<int64_t>(rows.of.spec.divergence) == kId) {
    device::launch(topk_kd_loss_rows<static_cast<Divergence>(kId), kIsResident>, grid, rows);
  } else {
    launch_divergence<kIsResident, kId + 1>(grid, rows);
  }
}

}  // namespace

extern "C" {

void emulator_schedule(uint64_t seed) { set_schedule(seed); }

const char* emulated_topk_kd_loss(const TopKRows* rows, int blocks, int cluster, int threads,
                                  bool is_resident) {
  const int bytes =
      topk_shared_bytes(rows->of.classes, rows->count, cluster, rows->of.logits, is_resident);
  const device::Grid grid{blocks, threads, cluster, bytes};
  return fault_of([&] {
    is_resident ? launch_divergence<true>(grid, *rows) : launch_divergence<false>(grid, *rows);
  });
}

// Of rows that are not held: the bytes of a block, and the longest list of at most `count`.
int topk_bytes(int classes, int count) {
  return topk_shared_bytes(classes, count, 1, Kind::kFloat, false);
}

int most_topk(int classes, int count, int most_shared) {
  return most_listed({count, kTopKListBytes}, topk_bytes(classes, count), most_shared);
}

}  // extern "C"
