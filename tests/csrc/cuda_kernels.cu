// Every instance of the CUDA kernels, for compilers alone.
#include <utility>

#include "cross_entropy_rows.cuh"
#include "kd_loss_rows.cuh"
#include "topk_kd_loss_rows.cuh"

namespace modxfer::cuda {

using Kernel = void (*)(KdRows);
using TopKKernel = void (*)(TopKRows);

template <bool kIsResident, int64_t... kIds>
void name(Kernel* kernels, TopKKernel* topk_kernels, std::integer_sequence<int64_t, kIds...>) {
  const Kernel all[] = {kd_loss_rows<static_cast<Divergence>(kIds), kIsResident>...,
                        kd_loss_rows<Divergence::kCount, kIsResident>,
                        cross_entropy_rows<kIsResident>};
  for (Kernel kernel : all) *kernels++ = kernel;
  const TopKKernel of_lists[] = {topk_kd_loss_rows<static_cast<Divergence>(kIds), kIsResident>...,
                                 topk_kd_loss_rows<Divergence::kCount, kIsResident>};
  for (TopKKernel kernel : of_lists) *topk_kernels++ = kernel;
}

void name_all(Kernel* kernels, TopKKernel* topk_kernels) {
  constexpr auto kIds = std::make_integer_sequence<int64_t, kNumSums>{};
  name<true>(kernels, topk_kernels, kIds);
  name<false>(kernels + kNumSums + 2, topk_kernels + kNumSums + 1, kIds);
}

}  // namespace modxfer::cuda
