// The loops of the streaming moments, of each instruction set.

#include "modxfer/correlation.h"
#include "modxfer/isa.h"

// The same bits for every instruction set, and in the rest of a vectorised loop.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace modxfer {

#define MODXFER_ROWS "correlation_rows.h"
#include "each_isa.h"

const CorrelationKernels& correlation_kernels() { return kernels_in_use(); }

}  // namespace modxfer
