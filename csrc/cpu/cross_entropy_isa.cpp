// The cross entropy's row kernels of each instruction set.

#include "modxfer/cross_entropy.h"
#include "modxfer/isa.h"

namespace modxfer {

#define MODXFER_ROWS "cross_entropy_rows.h"
#include "each_isa.h"

const CeRowKernels& ce_row_kernels() { return kernels_in_use(); }

}  // namespace modxfer
