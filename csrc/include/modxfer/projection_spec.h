// The spec of a projection loss from the arguments of an op.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "modxfer/projection_loss.h"

namespace modxfer {

inline ProjectionSpec make_projection_spec(int64_t loss, double beta, int64_t norm,
                                           double norm_eps) {
  STD_TORCH_CHECK(0 <= loss && loss <= 3, "loss: expected 0, 1, 2 or 3");
  STD_TORCH_CHECK(0 <= norm && norm <= 2, "norm: expected 0, 1 or 2");
  const float width = static_cast<float>(beta);
  return {static_cast<ProjectionLoss>(loss), width, 1.0f / width, static_cast<ProjectionNorm>(norm),
          static_cast<float>(norm_eps)};
}

}  // namespace modxfer
