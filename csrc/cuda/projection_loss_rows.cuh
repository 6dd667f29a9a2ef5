// The loss of rows of hidden states and its gradient, a block a row. Torch-free; formulas in
// kernels/projection_loss/reference.py, the same terms as the CPU's rows.
//
//   read     both rows
//   mean     of "layer"                                                     one reduction
//   scale    of a norm or a direction                                       one
//   sums     of the loss, and of what the gradient of a statistic needs     one
//   write    dz, which may lie over z
//
// Rows lie in registers from the first step to the last: each element is read once. Only rows wider
// than the registers of a block are read in each step.
#pragma once

#include "modxfer/projection_loss.h"
#include "projection_loss_plan.h"
#include "row_in_registers.cuh"

namespace modxfer::cuda {

#include "modxfer/projection_loss_terms.h"

struct ProjectionRows {
  Matrix z, t;               // [rows, width]
  const float* row_weights;  // a row of weight 0 is not read
  float* losses;             // [rows], unweighted
  Matrix dz;                 // without rows: the losses alone
  int rows, width;
  ProjectionSpec spec;
};

// The bytes of shared memory that a block needs: three sums of each warp.
constexpr int kProjectionBytes = 3 * kMaxWarps * static_cast<int>(sizeof(float));

// 0 where the row has no direction.
MODXFER_DEVICE float scale_of(float squares, float width, const ProjectionSpec& spec) {
  float scale = 1.0f;
  if (spec.norm != ProjectionNorm::kNone) {
    scale = 1.0f / device::sqrt(squares / width + spec.norm_eps);
  }
  if (is_direction(spec.loss)) {
    const float length = device::sqrt(squares) * scale;
    scale = length > static_cast<float>(kMinLength) ? scale / length : 0.0f;
  }
  return scale;
}

// kTerms: kSmoothL1, or kMse for all losses that are sums of squares.
template <ProjectionLoss kTerms, int kFours>
MODXFER_KERNEL void MODXFER_BOUNDS(kMostRowThreads, kFours > 4 ? 1 : 2)
    projection_loss_rows(MODXFER_ARGUMENT ProjectionRows of) {
  const ProjectionSpec& spec = of.spec;
  const int row = device::cluster_index();
  const bool has_dz = of.dz.rows != nullptr;
  const Target target(of.dz.rows, of.dz.stride, of.dz.kind);
  const float row_weight = of.row_weights[row];
  const auto put = [&](int i, const Four& values) {
    const int left = of.width - i;
    if (left > 0) target.put(row, i, left < 4 ? left : 4, values);
  };
  if (row_weight == 0.0f) {  // the row may hold anything, NaN included
    if (device::thread_index() == 0) of.losses[row] = 0.0f;
    if (has_dz) for_each_step<kFours>(of.width, [&](int k, int i) { put(i, Four{}); });
    return;
  }

  // --- read
  auto* warps = reinterpret_cast<float*>(device::shared_memory());
  const auto width = static_cast<float>(of.width);
  const bool is_centred = spec.norm == ProjectionNorm::kLayer;
  const bool has_statistics = spec.norm != ProjectionNorm::kNone || is_direction(spec.loss);
  RowInRegisters<kFours> a(of.z, row, of.width), b(of.t, row, of.width);
  a.read();
  b.read();
  a.widen();
  b.widen();

  // --- mean
  if (is_centred) {
    float sums[2] = {};
    for_each_step<kFours>(of.width, [&](int k, int i) {
      const Four a_i = a.at(k, i), b_i = b.at(k, i);
      MODXFER_UNROLL
      for (int j = 0; j < 4; ++j) {
        sums[0] += a_i.of[j];
        sums[1] += b_i.of[j];
      }
    });
    reduce_block<false, 2>(sums, warps);
    a.centre(sums[0] / width);
    b.centre(sums[1] / width);
  }

  // --- scale
  float scale = 1.0f;
  int missing = 0;  // sides without a direction
  if (has_statistics) {
    float squares[2] = {};
    for_each_step<kFours>(of.width, [&](int k, int i) {
      const Four a_i = a.at(k, i), b_i = b.at(k, i);
      MODXFER_UNROLL
      for (int j = 0; j < 4; ++j) {
        squares[0] += a_i.of[j] * a_i.of[j];
        squares[1] += b_i.of[j] * b_i.of[j];
      }
    });
    reduce_block<false, 2>(squares, warps);
    scale = scale_of(squares[0], width, spec);
    const float scale_b = scale_of(squares[1], width, spec);
    missing = (scale == 0.0f) + (scale_b == 0.0f);
    a.scale(scale);
    b.scale(scale_b);
  }

  // --- sums of f, g a and g; g takes b's registers
  float sums[3] = {};
  for_each_step<kFours>(of.width, [&](int k, int i) {
    const Four a_i = a.at(k, i), b_i = b.at(k, i);
    Four g;
    MODXFER_UNROLL
    for (int j = 0; j < 4; ++j) {
      const ProjectionTerms terms = projection_terms<kTerms>(a_i.of[j] - b_i.of[j], spec);
      sums[0] += terms.f;
      sums[1] += terms.g * a_i.of[j];
      sums[2] += terms.g;
      g.of[j] = terms.g;
    }
    if (kFours != kStreamed) b.set(k, g);
  });
  reduce_block<false, 3>(sums, warps);  // all threads have read z when the first writes over it
  float loss = sums[0];
  if (spec.loss == ProjectionLoss::kCosine) {
    // 1 - cos is half the squared distance of two directions; next to a row without one it is 1
    loss = 0.5f * (loss + static_cast<float>(missing));
  } else if (spec.loss != ProjectionLoss::kNormalizedMse) {
    loss /= width;
  }
  if (device::thread_index() == 0) of.losses[row] = loss;
  if (!has_dz) return;

  // --- write
  const float grad = row_weight * slope_factor(spec.loss, width) * scale;
  const float along = is_direction(spec.loss) ? sums[1] : sums[1] / width;
  const float mean_g = is_centred ? sums[2] / width : 0.0f;
  for_each_step<kFours>(of.width, [&](int k, int i) {
    const Four a_i = a.at(k, i), b_i = b.at(k, i);
    Four dz;
    MODXFER_UNROLL
    for (int j = 0; j < 4; ++j) {
      float g = b_i.of[j];
      if (kFours == kStreamed) g = projection_terms<kTerms>(a_i.of[j] - g, spec).g;
      dz.of[j] = grad * (has_statistics ? g - a_i.of[j] * along - mean_g : g);
    }
    // halves over the floats that they are made of: those of a step are read before
    if (kFours == kStreamed) device::sync_block();
    put(i, dz);
  });
}

}  // namespace modxfer::cuda
