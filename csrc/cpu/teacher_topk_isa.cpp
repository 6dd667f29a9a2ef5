// The kernels that find the largest logits of a row, of each instruction set.

#include "modxfer/isa.h"
#include "modxfer/teacher_topk.h"

namespace modxfer {

#define MODXFER_ROWS "teacher_topk_rows.h"
#include "each_isa.h"

const TopKKernels& topk_kernels() { return kernels_in_use(); }

}  // namespace modxfer
