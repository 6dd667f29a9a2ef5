// The projection loss row kernel of each instruction set.

#include "modxfer/isa.h"
#include "modxfer/projection_loss.h"

namespace modxfer {

// z * s - t * s of two equal rows is 0 only if neither product stays unrounded in a fused multiply
#define MODXFER_ROUNDS_PRODUCTS
#define MODXFER_ROWS "projection_loss_rows.h"
#include "each_isa.h"

const ProjectionRowKernel& projection_row_kernel() { return kernels_in_use(); }

}  // namespace modxfer
