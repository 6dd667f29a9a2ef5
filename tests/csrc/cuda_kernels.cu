// Every instance of the CUDA kernels, for compilers alone.
#include <utility>

#include "correlation_rows.cuh"
#include "cross_entropy_rows.cuh"
#include "kd_loss_rows.cuh"
#include "kd_loss_stages.cuh"
#include "lora_passes.h"
#include "projection_loss_rows.cuh"
#include "teacher_topk_rows.cuh"
#include "topk_kd_loss_rows.cuh"

namespace modxfer::cuda {

using Kernel = const void*;

template <class Function>
void name(Kernel*& kernels, Function* kernel) {
  *kernels++ = reinterpret_cast<Kernel>(kernel);
}

template <Divergence kDivergence>
void name_divergence(Kernel*& kernels) {
  name(kernels, kd_loss_rows<kDivergence, true>);
  name(kernels, kd_loss_rows<kDivergence, false>);
  if constexpr (kind_of_stats(kDivergence) == kDivergence) {
    name(kernels, kd_loss_stats<kDivergence>);
  }
  name(kernels, kd_loss_sums<kDivergence>);
  name(kernels, kd_loss_write<kDivergence>);
  if constexpr (!is_of_logits(kDivergence)) {
    name(kernels, topk_kd_loss_rows<kDivergence, true>);
    name(kernels, topk_kd_loss_rows<kDivergence, false>);
  }
}

template <int64_t... kIds>
void name_divergences(Kernel*& kernels, std::integer_sequence<int64_t, kIds...>) {
  (name_divergence<static_cast<Divergence>(kIds)>(kernels), ...);
}

template <ProjectionLoss kTerms>
void name_projection_loss(Kernel*& kernels) {
  name(kernels, projection_loss_rows<kTerms, 4>);
  name(kernels, projection_loss_rows<kTerms, 8>);
  name(kernels, projection_loss_rows<kTerms, kStreamed>);
}

void name_all(Kernel* kernels) {
  name(kernels, correlation_centre_rows);
  name(kernels, correlation_add_tile);
  name(kernels, cross_entropy_rows<true>);
  name(kernels, cross_entropy_rows<false>);
  name_projection_loss<ProjectionLoss::kMse>(kernels);
  name_projection_loss<ProjectionLoss::kSmoothL1>(kernels);
  name(kernels, teacher_topk_rows<true>);
  name(kernels, teacher_topk_rows<false>);
  name_divergences(kernels, std::make_integer_sequence<int64_t, kNumDivergences + 1>{});
  // each of those that a host may ask for
  const auto launch = [&](auto kernel, const auto&...) { name(kernels, kernel); };
  shrink({}, {}, {}, launch);
  ds_db({}, {}, launch);
  da({}, {}, {}, launch);
  reduce({}, {}, launch);
}

}  // namespace modxfer::cuda
