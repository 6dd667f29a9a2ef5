// Projection loss rows on a CPU: dtype and thread handling around the row kernel of
// projection_loss_isa.cpp.

#include "modxfer/projection_loss.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "modxfer/ops.h"
#include "modxfer/projection_spec.h"
#include "rows.h"

namespace modxfer {
namespace {

using torch::headeronly::ScalarType;

void check_same_shape(const Tensor& z, const Tensor& other) {
  STD_TORCH_CHECK(other.dim() == 2 && other.size(0) == z.size(0) && other.size(1) == z.size(1),
                  "rows: expected z, t and dz of one shape");
}

// Rows a thread takes at least: about 64k elements.
int64_t grain(int64_t D) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(D, 1)); }

}  // namespace

Tensor projection_loss_rows(Tensor z, Tensor t, Tensor row_weights, int64_t loss, double beta,
                            int64_t norm, double norm_eps, std::optional<Tensor> dz) {
  const int64_t M = z.size(0), D = z.size(1);
  const ProjectionSpec spec = make_projection_spec(loss, beta, norm, norm_eps);
  check_same_shape(z, t);
  if (dz.has_value()) check_same_shape(z, *dz);
  STD_TORCH_CHECK(row_weights.scalar_type() == ScalarType::Float && row_weights.is_contiguous() &&
                      row_weights.numel() == M,
                  "row_weights: expected contiguous float32, one a row");
  const Rows student(z), teacher(t), grad(dz.has_value() ? *dz : z);
  const auto* weights = static_cast<const float*>(row_weights.data_ptr());
  Tensor losses = torch::stable::new_empty(z, {M}, ScalarType::Float);
  auto* loss_rows = static_cast<float*>(losses.data_ptr());
  torch::stable::parallel_for(0, M, grain(D), [&](int64_t begin, int64_t end) {
    std::vector<float> z_buffer(student.buffer_size()), t_buffer(teacher.buffer_size());
    std::vector<float> dz_buffer(dz.has_value() ? grad.buffer_size() : 0);
    for (int64_t row = begin; row < end; ++row) {
      float* target = dz.has_value() ? grad.target(row, dz_buffer.data()) : nullptr;
      if (weights[row] == 0.0f) {  // the row may hold anything, NaN included
        loss_rows[row] = 0.0f;
        if (target != nullptr) std::fill_n(target, D, 0.0f);
      } else {
        loss_rows[row] = projection_row_kernel().row(student.read(row, z_buffer.data()),
                                                     teacher.read(row, t_buffer.data()), D,
                                                     weights[row], spec, target);
      }
      if (target != nullptr) grad.commit(row, target);
    }
  });
  return losses;
}

}  // namespace modxfer
