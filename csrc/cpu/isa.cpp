// The instruction set in use, for Python to see and to choose.

#include "modxfer/isa.h"

#include <torch/headeronly/util/Exception.h>

#include "modxfer/ops.h"

namespace modxfer {

bool has_instruction_set(int64_t index) {
  return 0 <= index && index <= static_cast<int64_t>(Isa::kAvx512) &&
         has_isa(static_cast<Isa>(index));
}

int64_t instruction_set() { return static_cast<int64_t>(isa_in_use().load()); }

void use_instruction_set(int64_t index) {
  STD_TORCH_CHECK(has_instruction_set(index), "index: expected a set that this processor has");
  isa_in_use() = static_cast<Isa>(index);
}

}  // namespace modxfer
