// Sums of products on Hopper, from CUTLASS's collectives: a warp loads tiles by TMA, two warp
// groups multiply them by wgmma into one accumulator, whichever pair of operands a tile is of.
//
//     y  = x W^T + s B^T + bias + residual             two pairs, right factors [columns, terms]
//     dx = sum over targets of dy W (+ ds A) + addend   a pair or two each, [terms, columns]
//
// Not materialised: [x, s] and [W, B] side by side, the product of one pair.
#pragma once

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "sum_of_products.cuh"

namespace modxfer::cuda {

template <class Element, bool kRightInRows>
struct HopperProduct {
  using Rows = cutlass::layout::RowMajor;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, Rows, kAligned,
      Element, Rows, kAligned, cutlass::epilogue::TmaWarpSpecializedCooperative,
      cutlass::epilogue::fusion::LinCombPerColBias<Element, float, Element>>::CollectiveOp;
  using Buffers = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(typename Epilogue::SharedStorage))>;
  using MainLoop = SumOfProducts<ProductOfTiles<Element, kRightInRows, Buffers>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, MainLoop,
                                                      Epilogue, TileScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Gemm::Arguments arguments_of(const LoraProduct& product) {
    using Stride = typename Epilogue::StrideC;
    // no addend: nothing is read, but its descriptor wants an address
    const Operand& addend = product.addend.data ? product.addend : product.result;
    auto* result = static_cast<Element*>(const_cast<void*>(product.result.data));
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {product.rows, product.columns, kStepTerms * num_steps(product.pairs, product.num_pairs),
         1},
        {&product},
        {{},
         static_cast<const Element*>(addend.data),
         stride_of<Stride>(addend),
         result,
         stride_of<Stride>(product.result)},
        {0, product.multiprocessors},
        {}};
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.thread.beta = product.addend.data ? 1.0f : 0.0f;
    arguments.epilogue.thread.bias_ptr = static_cast<const Element*>(product.bias);
    arguments.scheduler.max_swizzle_size = kSwizzle;
    return arguments;
  }

  // -> nullptr, or why it was not launched: CUTLASS keeps what CUDA says of that.
  static const char* launch(const LoraProduct& product, cudaStream_t stream) {
    using cutlass::Status;
    const auto arguments = arguments_of(product);
    Gemm gemm;
    Status status = Gemm::can_implement(arguments);
    const bool is_taken = status == Status::kSuccess;
    if (is_taken && Gemm::get_workspace_size(arguments) > 0) status = Status::kErrorWorkspaceNull;
    if (status == Status::kSuccess) status = gemm.run(arguments, nullptr, stream);
    return status == Status::kSuccess ? nullptr : cutlassGetStatusString(status);
  }
};

}  // namespace modxfer::cuda
