// The instance whose right factors are read row by row: W and B of y.
#include "lora_product.cuh"

namespace modxfer::cuda {

const char* launch_y(const LoraProduct& product, cudaStream_t stream) {
  return HopperProduct<cutlass::bfloat16_t, true>::launch(product, stream);
}

}  // namespace modxfer::cuda
