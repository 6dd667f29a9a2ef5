// Sums and products of features on a GPU: the launches of correlation_rows.cuh for tensors.

#include "correlation_rows.cuh"

#include <torch/csrc/stable/library.h>

#include "tensors.cuh"

namespace modxfer::cuda {

// As correlation_centre of modxfer/ops.h, on the stream of this number; sums [2, D] are left as
// partial results of blocks of rows -> [blocks, 2, D] fp64
Tensor correlation_centre_cuda(Tensor x, std::optional<Tensor> mask, Tensor shift, Tensor centred,
                               int64_t stream) {
  const int64_t rows = x.size(0), width = x.size(1);
  const int row_blocks = num_rows_of_blocks(static_cast<int>(rows));
  Tensor partial = torch::stable::new_empty(shift, {row_blocks, 2, width});
  const CentreRows of = {
      matrix_of(x),
      at<bool>(mask),
      static_cast<const double*>(shift.data_ptr()),
      matrix_of(centred),
      static_cast<double*>(partial.data_ptr()),
      static_cast<int>(rows),
      static_cast<int>(width),
  };
  if (rows == 0) return partial;
  const device::Grid grid{row_blocks * num_columns_of_blocks(of.width), kCentreWarps * kLanes, 1,
                          kCentreBytes};
  check(device::launch(correlation_centre_rows, grid, reinterpret_cast<cudaStream_t>(stream), of));
  return partial;
}

// As correlation_add of modxfer/ops.h, on the stream of this number.
void correlation_add_cuda(Tensor tile, Tensor total, int64_t stream) {
  const AddTile of = {
      static_cast<const float*>(tile.data_ptr()),
      static_cast<double*>(total.data_ptr()),
      total.stride(0),
      static_cast<int>(total.size(0)),
      static_cast<int>(total.size(1)),
  };
  if (of.rows == 0) return;
  const device::Grid grid{of.rows * num_blocks_a_row(of.width), kAddThreads, 1, 0};
  check(device::launch(correlation_add_tile, grid, reinterpret_cast<cudaStream_t>(stream), of));
}

}  // namespace modxfer::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(modxfer_csrc, m) {
  m.def(
      "correlation_centre_cuda(Tensor x, Tensor? mask, Tensor shift, Tensor(a!) centred, "
      "int stream) -> Tensor partial");
  m.def("correlation_add_cuda(Tensor tile, Tensor(a!) total, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CUDA, m) {
  m.impl("correlation_centre_cuda", TORCH_BOX(&modxfer::cuda::correlation_centre_cuda));
  m.impl("correlation_add_cuda", TORCH_BOX(&modxfer::cuda::correlation_add_cuda));
}
