// Sums of products on Hopper: the launch of lora_product.cuh for tensors.

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "lora_product.h"

namespace modxfer::cuda {

using torch::stable::Tensor;

// Instances of their own files.
const char* launch_y(const LoraProduct& product, cudaStream_t stream);
const char* launch_dx(const LoraProduct& product, cudaStream_t stream);

namespace {

// A vector is a row.
Operand operand_of(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16, name,
                  ": expected bfloat16");
  const int64_t dim = tensor.dim(), last = dim - 1;
  const int64_t length = dim == 2 ? tensor.size(0) : 1;
  STD_TORCH_CHECK((dim == 2 || dim == 1) && length == rows && tensor.size(last) == columns, name,
                  ": expected [", rows, ", ", columns, "], got [", length, ", ", tensor.size(last),
                  "]");
  const int64_t stride = dim == 2 ? tensor.stride(0) : columns;
  STD_TORCH_CHECK(columns % kAligned == 0 && stride % kAligned == 0 && tensor.stride(last) == 1 &&
                      reinterpret_cast<uintptr_t>(tensor.data_ptr()) % (2 * kAligned) == 0,
                  name, ": expected rows that begin at multiples of 16 bytes, got ", columns,
                  " columns and strides ", stride, ", ", tensor.stride(last));
  return {tensor.data_ptr(), stride};
}

}  // namespace

// result [M, N] = sum of lefts [M, L] times rights, [N, L] each or [L, N], + addend + bias, rounded
// once; the addend may be the result. bf16 on a device of capability 9.0, on the stream of this
// number.
void lora_product_cuda(std::vector<Tensor> lefts, std::vector<Tensor> rights, bool rights_in_rows,
                       std::optional<Tensor> addend, std::optional<Tensor> bias, Tensor result,
                       int64_t multiprocessors, int64_t stream) {
  const int64_t rows = result.size(0), columns = result.size(1);
  LoraProduct product = {};
  product.rows = static_cast<int>(rows);
  product.columns = static_cast<int>(columns);
  product.num_pairs = static_cast<int>(lefts.size());
  STD_TORCH_CHECK(!lefts.empty() && lefts.size() <= kMostPairs && lefts.size() == rights.size(),
                  "lefts, rights: expected one to ", kMostPairs, " of each, got ", lefts.size(),
                  " and ", rights.size());
  for (size_t i = 0; i < lefts.size(); ++i) {
    const int64_t terms = lefts[i].size(1);
    product.pairs[i] = {operand_of("lefts", lefts[i], rows, terms),
                        rights_in_rows ? operand_of("rights", rights[i], columns, terms)
                                       : operand_of("rights", rights[i], terms, columns),
                        static_cast<int>(terms)};
  }
  if (addend.has_value()) product.addend = operand_of("addend", *addend, rows, columns);
  if (bias.has_value()) product.bias = operand_of("bias", *bias, 1, columns).data;
  product.result = operand_of("result", result, rows, columns);
  product.multiprocessors = static_cast<int>(multiprocessors);
  const auto launch = rights_in_rows ? launch_y : launch_dx;
  const char* reason = launch(product, reinterpret_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(reason == nullptr, "lora_product: not launched, CUTLASS says: ", reason);
}

}  // namespace modxfer::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(modxfer_csrc, m) {
  m.def(
      "lora_product_cuda(Tensor[] lefts, Tensor[] rights, bool rights_in_rows, Tensor? addend, "
      "Tensor? bias, Tensor(a!) result, int multiprocessors, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CUDA, m) {
  m.impl("lora_product_cuda", TORCH_BOX(&modxfer::cuda::lora_product_cuda));
}
