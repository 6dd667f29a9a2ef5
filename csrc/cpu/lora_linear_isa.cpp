// The kernels of a LoRA linear, of each instruction set.

#include "modxfer/isa.h"
#include "modxfer/lora_linear.h"

namespace modxfer {

#define MODXFER_ROWS "lora_linear_rows.h"
#include "each_isa.h"

const LoraKernels& lora_kernels() { return kernels_in_use(); }

}  // namespace modxfer
