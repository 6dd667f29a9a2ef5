// Projection loss through factors of low rank, in one pass over the rows.
//
// M rows   N, D widths of student and teacher   R rank; notation of kernels/projection_loss/op.py
//
//   u = h P_a^T    z = u P_b^T + bias    loss, dz of (z, t)    dP_b += dz^T u    dbias += dz
//   du = dz P_b    dP_a += du^T h        dh = du P_a
//
// A block of rows passes through all of it while it is in the second cache: h, t are read once and
// dh written once, and z, dz, u, du exist for a block. Sums over rows as in lora_linear.cpp: the
// same bits for any number of threads.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "modxfer/lora_linear.h"
#include "modxfer/ops.h"
#include "modxfer/projection_loss.h"
#include "modxfer/projection_spec.h"
#include "row_blocks.h"

namespace modxfer {
namespace {

using torch::headeronly::ScalarType;

constexpr Mask kEverything{nullptr, 0};

float* floats(const Tensor& tensor, int64_t size, const char* message) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() == size,
      message);
  return static_cast<float*>(tensor.data_ptr());
}

void write(const OuterSums& sums, const std::optional<Tensor>& grad, bool transposed) {
  if (!grad.has_value()) return;
  sums.write(*grad, grad->stride(transposed ? 1 : 0), grad->stride(transposed ? 0 : 1));
}

}  // namespace

void projection_loss_low_rank(Tensor hidden, Tensor teacher, Tensor projection, Tensor projection_a,
                              std::optional<Tensor> bias, Tensor row_weights,
                              std::optional<Tensor> kept, int64_t loss, double beta, int64_t norm,
                              double norm_eps, Tensor losses, std::optional<Tensor> dhidden,
                              std::optional<Tensor> dprojection,
                              std::optional<Tensor> dprojection_a, std::optional<Tensor> dbias) {
  const int64_t N = hidden.size(1), D = teacher.size(1), R = projection_a.size(0);
  STD_TORCH_CHECK(projection.size(0) == D && projection.size(1) == R && projection_a.size(1) == N &&
                      teacher.size(0) == hidden.size(0),
                  "projection: expected [D, R] and [R, N] for rows of N and D");
  const ProjectionSpec spec = make_projection_spec(loss, beta, norm, norm_eps);
  const float* weights = floats(row_weights, hidden.size(0), "row_weights: expected float32 [M]");
  float* loss_rows = floats(losses, hidden.size(0), "losses: expected float32 [M]");
  const float* bias_row =
      bias.has_value() ? floats(*bias, D, "bias: expected float32 [D]") : nullptr;
  float* dbias_row = dbias.has_value() ? floats(*dbias, D, "dbias: expected float32 [D]") : nullptr;
  const int64_t* index = nullptr;
  if (kept.has_value()) {
    STD_TORCH_CHECK(kept->scalar_type() == ScalarType::Long && kept->is_contiguous(),
                    "kept: expected contiguous int64");
    index = static_cast<const int64_t*>(kept->data_ptr());
  }
  const int64_t M = kept.has_value() ? kept->numel() : hidden.size(0);

  const LoraKernels& kernels = lora_kernels();
  const ProjectionRowKernel& row_kernel = projection_row_kernel();
  const Buffer a_panels = pack_a(projection_a), b_panels = pack_b(projection);
  const bool needs_du = dhidden.has_value() || dprojection_a.has_value();
  const bool needs_dz = needs_du || dprojection.has_value() || dbias.has_value();
  const int64_t chunk_rows = rows_per_chunk(M), chunks = ceil_div(M, chunk_rows);
  const OuterSums a_sums(dprojection_a.has_value() ? chunks : 0, R, N);
  const OuterSums b_sums(dprojection.has_value() ? chunks : 0, R, D);
  const Buffer bias_sums(dbias.has_value() ? chunks * D : 0);

  const int64_t block = rows_per_block(std::max(N, D));
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    RowBlock h_rows(hidden, block, index), t_rows(teacher, block, index);
    RowBlocks dh_rows;
    if (dhidden.has_value()) dh_rows.emplace_back(*dhidden, block, index);
    const Buffer u(block * R), du(block * R), z(block * D);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t chunk_first = chunk * chunk_rows, last = std::min(M, chunk_first + chunk_rows);
      float* bias_sum = bias_sums.data() + (dbias.has_value() ? chunk * D : 0);
      if (dbias.has_value()) std::fill_n(bias_sum, D, 0.0f);
      for (int64_t first = chunk_first; first < last; first += block) {
        const int64_t rows = std::min(block, last - first);
        const bool accumulate = first != chunk_first;
        const Matrix h = h_rows.read(first, rows), t = t_rows.read(first, rows);
        kernels.shrink(h, kEverything, rows, N, a_panels.data(), R, 1.0f, u.data(), R);
        kernels.expand({u.data(), R}, rows, R, b_panels.data(), D, kEverything, {bias_row, 0},
                       z.data(), D);
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t at = index == nullptr ? first + row : index[first + row];
          float* z_row = z.data() + row * D;
          if (weights[at] == 0.0f) {  // the teacher's row may hold anything, NaN included
            loss_rows[at] = 0.0f;
            std::fill_n(z_row, D, 0.0f);
          } else {
            loss_rows[at] = row_kernel.row(z_row, t.data + row * t.stride, D, weights[at], spec,
                                           needs_dz ? z_row : nullptr);
          }
        }
        if (!needs_dz) continue;
        const Matrix dz{z.data(), D};
        if (dprojection.has_value()) {
          kernels.outer({u.data(), R}, dz, kEverything, rows, R, D, accumulate,
                        b_sums.chunk(chunk));
        }
        if (dbias.has_value()) {
          for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < D; ++i) bias_sum[i] += dz.data[row * D + i];
          }
        }
        if (!needs_du) continue;
        kernels.shrink(dz, kEverything, rows, D, b_panels.data(), R, 1.0f, du.data(), R);
        if (dprojection_a.has_value()) {
          kernels.outer({du.data(), R}, h, kEverything, rows, R, N, accumulate,
                        a_sums.chunk(chunk));
        }
        if (dhidden.has_value()) {
          float* target = dh_rows[0].target(first);
          kernels.expand({du.data(), R}, rows, R, a_panels.data(), N, kEverything, {nullptr, 0},
                         target, dh_rows[0].stride());
          dh_rows[0].commit(first, rows);
        }
      }
    }
  });
  write(b_sums, dprojection, true);
  write(a_sums, dprojection_a, false);
  if (!dbias.has_value()) return;
  std::fill_n(dbias_row, D, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < D; ++i) dbias_row[i] += bias_sums.data()[chunk * D + i];
  }
}

}  // namespace modxfer
