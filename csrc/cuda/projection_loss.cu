// The projection loss's rows on a GPU: the launch of projection_loss_rows.cuh for tensors.

#include "projection_loss_rows.cuh"

#include <torch/csrc/stable/library.h>

#include "modxfer/projection_spec.h"
#include "tensors.cuh"

namespace modxfer::cuda {
namespace {

using Kernel = void (*)(ProjectionRows);

template <ProjectionLoss kTerms>
Kernel kernel_of(int fours) {
  switch (fours) {
    case 4:
      return projection_loss_rows<kTerms, 4>;
    case 8:
      return projection_loss_rows<kTerms, 8>;
    default:
      return projection_loss_rows<kTerms, kStreamed>;
  }
}

}  // namespace

// As projection_loss_rows of modxfer/ops.h, on the stream of this number; dtypes may differ.
Tensor projection_loss_cuda(Tensor z, Tensor t, Tensor row_weights, int64_t loss, double beta,
                            int64_t norm, double norm_eps, std::optional<Tensor> dz,
                            int64_t stream) {
  Tensor losses = new_floats(z, {z.size(0)});
  ProjectionRows rows = {};
  rows.z = matrix_of(z);
  rows.t = matrix_of(t);
  rows.row_weights = static_cast<const float*>(row_weights.data_ptr());
  rows.losses = static_cast<float*>(losses.data_ptr());
  if (dz.has_value()) rows.dz = matrix_of(*dz);
  rows.rows = static_cast<int>(z.size(0));
  rows.width = static_cast<int>(z.size(1));
  rows.spec = make_projection_spec(loss, beta, norm, norm_eps);
  if (rows.rows == 0) return losses;
  const RowPlan plan = row_plan_of(rows.width);
  const device::Grid grid{rows.rows, plan.threads, 1, kProjectionBytes};
  const bool is_smooth = rows.spec.loss == ProjectionLoss::kSmoothL1;
  check(device::launch(is_smooth ? kernel_of<ProjectionLoss::kSmoothL1>(plan.fours)
                                 : kernel_of<ProjectionLoss::kMse>(plan.fours),
                       grid, reinterpret_cast<cudaStream_t>(stream), rows));
  return losses;
}

}  // namespace modxfer::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(modxfer_csrc, m) {
  m.def(
      "projection_loss_cuda(Tensor z, Tensor t, Tensor row_weights, int loss, float beta, "
      "int norm, float norm_eps, Tensor(a!)? dz, int stream) -> Tensor loss");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CUDA, m) {
  m.impl("projection_loss_cuda", TORCH_BOX(&modxfer::cuda::projection_loss_cuda));
}
