// The kernels that bend rows of logits, of each instruction set.

#include "modxfer/bend.h"
#include "modxfer/isa.h"

namespace modxfer {

#define MODXFER_ROWS "bend_rows.h"
#include "each_isa.h"

const BendRowKernels& bend_row_kernels() { return kernels_in_use(); }

}  // namespace modxfer
