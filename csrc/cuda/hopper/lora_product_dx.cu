// The instance whose right factors are read column by column: W and A of dx.
#include "lora_product.cuh"

namespace modxfer::cuda {

const char* launch_dx(const LoraProduct& product, cudaStream_t stream) {
  return HopperProduct<cutlass::bfloat16_t, false>::launch(product, stream);
}

}  // namespace modxfer::cuda
