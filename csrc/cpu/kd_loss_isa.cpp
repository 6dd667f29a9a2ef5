// The KD row kernels of each instruction set.

#include <array>
#include <utility>

#include "modxfer/isa.h"
#include "modxfer/kd_loss.h"

namespace modxfer {

#define MODXFER_ROWS "kd_loss_rows.h"
#include "each_isa.h"

const KdRowKernels& kd_row_kernels(Divergence divergence) {
  return kernels_in_use()[static_cast<size_t>(divergence)];
}

}  // namespace modxfer
