// The main loop of sums of products on Hopper: CUTLASS's own of one product, which a warp feeds
// with the tiles of one pair of operands after the other.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include "lora_product.h"

namespace modxfer::cuda {

using Tile = cute::Shape<cute::_128, cute::_256, cute::Int<kStepTerms>>;
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;  // two blocks share the right tiles
// Clusters that run together cover a square of tiles, whose operands then are in L2.
constexpr int kSwizzle = 8;
using TileScheduler = cutlass::gemm::PersistentScheduler;

// kRightInRows: the right factors are [columns, terms], else [terms, columns]. Buffers: how many
// steps are in shared memory at once.
template <class Element, bool kRightInRows, class Buffers>
using ProductOfTiles = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor,
    kAligned, Element,
    cute::conditional_t<kRightInRows, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>,
    kAligned, float, Tile, Cluster, Buffers,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;

// One element of a row follows the other; what a row is depends on the stride.
template <class Stride>
Stride stride_of(const Operand& operand) {
  Stride stride{};
  constexpr bool kInRows = cute::is_static<decltype(cute::get<1>(stride))>::value;
  cute::get<kInRows ? 0 : 1>(stride) = operand.stride;
  return stride;
}

// CUTLASS's main loop of one product, whose sum goes on with the next pair's. To the kernel around
// it this is one product with as many steps as all pairs have.
template <class Product>
struct SumOfProducts : Product {
  using typename Product::ElementA;
  using typename Product::ElementB;
  using typename Product::MainloopPipeline;
  using typename Product::PipelineState;
  using typename Product::StrideA;
  using typename Product::StrideB;
  using typename Product::TensorStorage;
  static_assert(cute::size<2>(typename Product::TileShape{}) == kStepTerms);

  struct Arguments {
    const LoraProduct* product;
  };

  struct PairParams {
    typename Product::Params tiles;
    int terms;
  };

  struct Params {
    PairParams pairs[kMostPairs];
    int num_pairs;
    uint32_t tma_transaction_bytes = Product::TmaTransactionBytes;
  };

  static typename Product::Arguments arguments_of(const Pair& pair) {
    return {static_cast<const ElementA*>(pair.left.data), stride_of<StrideA>(pair.left),
            static_cast<const ElementB*>(pair.right.data), stride_of<StrideB>(pair.right)};
  }

  template <class Shape>
  static Params to_underlying_arguments(const Shape& shape, const Arguments& args, void*) {
    const LoraProduct& product = *args.product;
    Params params;
    params.num_pairs = product.num_pairs;
    for (int i = 0; i < product.num_pairs; ++i) {
      const Pair& pair = product.pairs[i];
      const auto size = cute::replace<2>(shape, pair.terms);
      params.pairs[i] = {Product::to_underlying_arguments(size, arguments_of(pair), nullptr),
                         pair.terms};
    }
    return params;
  }

  template <class Shape>
  static bool can_implement(const Shape& shape, const Arguments& args) {
    const LoraProduct& product = *args.product;
    for (int i = 0; i < product.num_pairs; ++i) {
      const Pair& pair = product.pairs[i];
      const auto size = cute::replace<2>(shape, pair.terms);
      if (!Product::can_implement(size, arguments_of(pair))) return false;
    }
    return true;
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    for (int i = 0; i < params.num_pairs; ++i) {
      Product::prefetch_tma_descriptors(params.pairs[i].tiles);
    }
  }

  // Coordinates of tiles, which are those of every pair.
  template <class Shape>
  CUTLASS_DEVICE auto load_init(const Shape& shape, const Params& params) const {
    return Product::load_init(shape, params.pairs[0].tiles);
  }

  template <class Tiles, class Steps, class Block>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState state,
                           const Tiles& tiles, const Block& block, Steps, int, int thread,
                           uint32_t rank_in_cluster, TensorStorage& shared) {
    load_in_order(params.pairs, params.num_pairs, state,
                  [&](const PairParams& pair, int steps, PipelineState first) {
                    Product::load(pair.tiles, pipeline, first, tiles, block,
                                  cute::make_coord_iterator(steps), steps, thread, rank_in_cluster,
                                  shared);
                  });
  }

  template <class Sums>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState state, Sums& sums, int steps,
                          int thread, TensorStorage& shared, const Params& params) {
    Product::mma(pipeline, state, sums, steps, thread, shared, params.pairs[0].tiles);
  }
};

}  // namespace modxfer::cuda
