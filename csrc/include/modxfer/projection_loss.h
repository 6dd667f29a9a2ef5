// Loss of one row of projected student states against a teacher's. Torch-free.
#pragma once

#include <cstdint>

namespace modxfer {

enum class ProjectionLoss : int64_t { kMse = 0, kNormalizedMse = 1, kCosine = 2, kSmoothL1 = 3 };
enum class ProjectionNorm : int64_t { kNone = 0, kRms = 1, kLayer = 2 };

// What is computed; formulas in kernels/projection_loss/reference.py.
struct ProjectionSpec {
  ProjectionLoss loss;
  float beta;      // of smooth_l1
  float inv_beta;  // infinite for beta = 0
  ProjectionNorm norm;
  float norm_eps;
};

// A row no longer than this has no direction.
constexpr double kMinLength = 1e-12;

// Row kernel of one instruction set. Returns the loss of z against t, D floats each, unweighted;
// writes dz, the gradient of row_weight * loss, unless it is null. dz may be z.
struct ProjectionRowKernel {
  const char* isa;
  float (*row)(const float* z, const float* t, int64_t D, float row_weight,
               const ProjectionSpec& spec, float* dz);
};

// The kernel of the instruction set in use.
const ProjectionRowKernel& projection_row_kernel();

}  // namespace modxfer
