// The CUDA rows of the KD loss and of the cross entropy on the emulator, as a library with C names.
#include "emulated.h"

#include <type_traits>

#include "cross_entropy_rows.cuh"
#include "kd_loss_plan.h"
#include "kd_loss_rows.cuh"
#include "kd_loss_stages.cuh"

namespace {

using namespace modxfer;
using namespace modxfer::cuda;

// Calls body with the divergence as a constant; kCount of a weighted sum.
template <int64_t kId = 0, class Body>
void with_divergence(Divergence divergence, const Body& body) {
  constexpr auto kDivergence = static_cast<Divergence>(kId);
  if constexpr (kDivergence == Divergence::kCount) {
    body(std::integral_constant<Divergence, kDivergence>{});
  } else if (divergence == kDivergence) {
    body(std::integral_constant<Divergence, kDivergence>{});
  } else {
    with_divergence<kId + 1>(divergence, body);
  }
}

template <class Launch>
const char* fault_of_kd(const KdRows& rows, const Launch& launch) {
  return fault_of([&] { with_divergence(rows.spec.divergence, launch); });
}

device::Grid grid_of(const KdRows& rows, int blocks, int cluster, int threads, bool is_resident) {
  return {blocks, threads, cluster, shared_bytes(rows.classes, cluster, rows.logits, is_resident)};
}

}  // namespace

extern "C" {

void emulator_schedule(uint64_t seed) { set_schedule(seed); }

const char* emulated_kd_loss(const KdRows* rows, int blocks, int cluster, int threads,
                             bool is_resident) {
  const device::Grid grid = grid_of(*rows, blocks, cluster, threads, is_resident);
  return fault_of_kd(*rows, [&](auto of) {
    constexpr Divergence kDivergence = decltype(of)::value;
    device::launch(is_resident ? kd_loss_rows<kDivergence, true> : kd_loss_rows<kDivergence, false>,
                   grid, *rows);
  });
}

const char* emulated_kd_loss_stats(const KdRows* rows, int blocks, int cluster, int threads,
                                   bool is_resident, float* parts, int width) {
  const device::Grid grid = grid_of(*rows, blocks, cluster, threads, false);
  return fault_of_kd(*rows, [&](auto of) {
    constexpr Divergence kDivergence = decltype(of)::value;
    device::launch(kd_loss_stats<kind_of_stats(kDivergence)>, grid, *rows, parts, width);
  });
}

const char* emulated_kd_loss_sums(const KdRows* rows, int blocks, int cluster, int threads,
                                  bool is_resident, const float* stats, float* sums) {
  const device::Grid grid = grid_of(*rows, blocks, cluster, threads, false);
  return fault_of_kd(*rows, [&](auto of) {
    constexpr Divergence kDivergence = decltype(of)::value;
    device::launch(kd_loss_sums<kDivergence>, grid, *rows, stats, sums);
  });
}

const char* emulated_kd_loss_write(const KdRows* rows, int blocks, int cluster, int threads,
                                   bool is_resident, const float* stats) {
  const device::Grid grid = grid_of(*rows, blocks, cluster, threads, false);
  return fault_of_kd(*rows, [&](auto of) {
    constexpr Divergence kDivergence = decltype(of)::value;
    device::launch(kd_loss_write<kDivergence>, grid, *rows, stats);
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

using AtOnce = int (*)(int cluster, int threads, int bytes);

// is_resident, cluster, blocks, threads and the bytes of a block; registers of the kernel that
// holds rows; clusters that the device runs at once.
void planned_kd_loss(int rows, int classes, int logit_bytes, int most_shared, int registers,
                     AtOnce clusters_at_once, int* found) {
  const Kind kind = logit_bytes == 4 ? Kind::kFloat : Kind::kBf16;
  const auto bytes_of = [&](int cluster, bool is_resident) {
    return shared_bytes(classes, cluster, kind, is_resident);
  };
  const auto at_once = [&](const Plan& plan) {
    return clusters_at_once(plan.cluster, plan.threads, bytes_of(plan.cluster, plan.is_resident));
  };
  const Plan plan = plan_of(
      rows, most_shared, registers, [&](int cluster) { return bytes_of(cluster, true); }, at_once);
  const int bytes = bytes_of(plan.cluster, plan.is_resident);
  const int all[] = {plan.is_resident, plan.cluster, plan.blocks, plan.threads, bytes};
  for (int value : all) *found++ = value;
}

}  // extern "C"
