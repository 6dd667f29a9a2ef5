// The loops of the sums and products of rows, of each instruction set.

#include "modxfer/correlation.h"
#include "modxfer/isa.h"

namespace modxfer {

// The same bits for every instruction set, and in the rest of a vectorised loop.
#define MODXFER_ROUNDS_PRODUCTS
#define MODXFER_ROWS "correlation_rows.h"
#include "each_isa.h"

const CorrelationKernels& correlation_kernels() { return kernels_in_use(); }

}  // namespace modxfer
