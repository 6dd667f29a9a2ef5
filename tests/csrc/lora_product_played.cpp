// The kernel of csrc/cuda/hopper/lora_product.cuh played by a C++ compiler, but for its epilogue.
//
// Its own code makes the descriptors, orders the loads, walks through the tiles and says where an
// element lies; CUTLASS's layouts and pipeline states are CUTLASS's. What hardware does is told
// here: a TMA copy by its descriptor, barriers by counts, a matrix instruction by three loops. Each
// product is of small integers, whose sums are exact, and is compared with the sum in double.
//
//   lora_product_played CASES SEED          prints "ok CASES products, STEPS steps"
#include <vector_types.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

static const uint3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};
inline void __syncthreads() {}
inline void __syncwarp() {}

// CUTLASS asks for nvcc's version where it has Hopper's atoms, and in wmma.h for what nvcc alone
// has
#undef __CUDACC_VER_MAJOR__
#undef __CUDACC_VER_MINOR__
#include <cutlass/cutlass.h>

#include <cutlass/arch/wmma.h>
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#include "hopper/sum_of_products.cuh"

#define CHECK(what)                                                   \
  do {                                                                \
    if (!(what)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what); \
      std::exit(1);                                                   \
    }                                                                 \
  } while (false)

// --- what a descriptor says, and what a copy by it does

struct Descriptor {
  const uint16_t* data;
  std::vector<uint64_t> size, stride;  // of each dimension, strides in elements
  std::vector<uint32_t> box;
};

std::vector<Descriptor> descriptors;

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type,
                                           cuuint32_t rank, void* address, const cuuint64_t* sizes,
                                           const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* steps, CUtensorMapInterleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill fill) {
  // what the driver refuses
  CHECK(reinterpret_cast<uintptr_t>(address) % 16 == 0);
  CHECK(rank >= 1 && rank <= 5);
  CHECK(type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
  CHECK(swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * 2 == 128);
  CHECK(fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // zeros
  Descriptor made = {static_cast<const uint16_t*>(address), {}, {1}, {}};
  for (uint32_t i = 0; i < rank; ++i) {
    CHECK(sizes[i] > 0 && box[i] > 0 && box[i] <= 256 && steps[i] == 1);
    made.size.push_back(sizes[i]);
    made.box.push_back(box[i]);
    if (i + 1 < rank) {
      CHECK(strides[i] % 16 == 0);
      made.stride.push_back(strides[i] / 2);
    }
  }
  const uint64_t index = descriptors.size();
  descriptors.push_back(made);
  std::memcpy(map, &index, sizeof(index));
  return CUDA_SUCCESS;
}

int elements_of(const Descriptor& descriptor) {
  int count = 1;
  for (uint32_t length : descriptor.box) count *= static_cast<int>(length);
  return count;
}

// One copy: rows of 128 bytes, whose sixteenths change places with their row's number in eight.
void play_copy(const Descriptor& descriptor, const std::vector<int64_t>& first, uint16_t* shared) {
  const size_t rank = descriptor.box.size();
  CHECK(first.size() == rank && reinterpret_cast<uintptr_t>(shared) % 1024 == 0);
  std::vector<int64_t> at(rank, 0);
  const int count = elements_of(descriptor);
  for (int i = 0; i < count; ++i) {
    bool is_inside = true;
    int64_t offset = 0;
    for (size_t d = 0; d < rank; ++d) {
      const int64_t place = first[d] + at[d];
      is_inside &= place >= 0 && place < static_cast<int64_t>(descriptor.size[d]);
      offset += place * static_cast<int64_t>(descriptor.stride[d]);
    }
    const int byte = 2 * i, swizzled = byte ^ ((byte >> 7 & 7) << 4);
    shared[swizzled / 2] = is_inside ? descriptor.data[offset] : 0;
    for (size_t d = 0; d < rank && ++at[d] == static_cast<int64_t>(descriptor.box[d]); ++d) {
      at[d] = 0;
    }
  }
}

// --- CUTLASS's main loop, whose loads are written down

namespace modxfer::cuda {

using namespace cute;
constexpr int kBuffers = 4, kBlocks = size<0>(Cluster{});

template <bool kRightInRows>
using RealProduct = ProductOfTiles<cutlass::bfloat16_t, kRightInRows,
                                   cutlass::gemm::collective::StageCount<kBuffers>>;

// A step that the loading warp asks for.
struct Load {
  const void* tiles;
  int k;
  int buffer;
  uint32_t phase;
};

template <bool kRightInRows>
struct WrittenDown : RealProduct<kRightInRows> {
  using Real = RealProduct<kRightInRows>;
  struct MainloopPipeline {
    std::vector<Load>* loads;
  };

  template <class Tiles, class Block, class Iterator>
  void load(const typename Real::Params& params, MainloopPipeline pipeline,
            typename Real::PipelineState state, const Tiles&, const Block&, Iterator k, int steps,
            int, uint32_t, typename Real::TensorStorage&) {
    for (; steps > 0; --steps, ++k, ++state) {
      pipeline.loads->push_back({&params, static_cast<int>(*k), state.index(), state.phase()});
    }
  }
};

template <class Map>
const Descriptor& descriptor_of(const Map* map) {
  uint64_t index;
  std::memcpy(&index, map, sizeof(index));
  return descriptors.at(index);
}

template <class Coordinate>
std::vector<int64_t> numbers_of(const Coordinate& coordinate) {
  std::vector<int64_t> numbers;
  for_each(flatten_to_tuple(coordinate),
           [&](auto number) { numbers.push_back(static_cast<int64_t>(number)); });
  return numbers;
}

// All copies by which a block fills its part of an operand's tile, which `sharers` blocks fill
// together: from coordinates `source` to places `target`, a part of each copy's range.
template <class Source, class Target, class Map>
void play_copies(const Source& source, Target&& target, const Map* map, int sharers) {
  const Descriptor& descriptor = descriptor_of(map);
  const int range = elements_of(descriptor) * sharers;
  CHECK(size(source) == size(target) && size(source) % range == 0);
  for (int i = 0; i < size(source); i += range) {
    play_copy(descriptor, numbers_of(source(i)),
              reinterpret_cast<uint16_t*>(raw_pointer_cast(&target(i))));
  }
}

// --- a block and a cluster of blocks

float to_float(cutlass::bfloat16_t x) { return static_cast<float>(x); }

// Of one block: its buffers, how often each was filled and freed, and its loads.
template <class Real>
struct Block {
  alignas(1024) typename Real::TensorStorage shared;
  int filled[kBuffers] = {}, freed[kBuffers] = {};
  std::vector<Load> loads;
  std::vector<float> sums = std::vector<float>(size<0>(Tile{}) * size<1>(Tile{}));

  auto left() {
    return make_tensor(make_smem_ptr(shared.smem_A.data()), typename Real::SmemLayoutA{});
  }
  auto right() {
    return make_tensor(make_smem_ptr(shared.smem_B.data()), typename Real::SmemLayoutB{});
  }

  void multiply(int buffer) {
    constexpr int kRows = size<0>(Tile{}), kColumns = size<1>(Tile{});
    auto sA = left();
    auto sB = right();
    std::vector<float> b(kStepTerms * kColumns);
    for (int k = 0; k < kStepTerms; ++k) {
      for (int n = 0; n < kColumns; ++n) b[k * kColumns + n] = to_float(sB(n, k, buffer));
    }
    for (int m = 0; m < kRows; ++m) {
      float* sum = &sums[m * kColumns];
      for (int k = 0; k < kStepTerms; ++k) {
        const float a = to_float(sA(m, k, buffer));
        const float* row = &b[k * kColumns];
        for (int n = 0; n < kColumns; ++n) sum[n] += a * row[n];
      }
    }
  }
};

std::mt19937 generator;

int random(int least, int most) {
  return std::uniform_int_distribution<int>(least, most)(generator);
}

// A matrix of small integers, in a larger one of NaN.
struct Numbers {
  std::vector<cutlass::bfloat16_t> memory;
  int64_t stride = 0, first = 0;

  Numbers(int rows, int columns) {
    stride = kAligned * (columns / kAligned + random(0, 3));
    memory.assign((rows + 2) * stride + 64, cutlass::bfloat16_t::bitcast(0x7FC0));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    first = static_cast<int64_t>((16 - address % 16) % 16 / 2) + stride;
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        memory[first + i * stride + j] = cutlass::bfloat16_t(static_cast<float>(random(-3, 3)));
      }
    }
  }
  double at(int i, int j) const { return static_cast<float>(memory[first + i * stride + j]); }
  Operand operand() const { return {&memory[first], stride}; }
};

template <bool kRightInRows>
struct Kernel {
  using Real = RealProduct<kRightInRows>;
  using Main = SumOfProducts<WrittenDown<kRightInRows>>;
  using Scheduler =
      cutlass::gemm::kernel::detail::TileSchedulerSelector<TileScheduler, cutlass::arch::Sm90, Tile,
                                                           Cluster, 0>::Scheduler;
  using State = typename Main::PipelineState;

  const LoraProduct& product;
  Shape<int, int, int, int> shape;
  typename Main::Params params;
  long steps = 0;

  explicit Kernel(const LoraProduct& of)
      : product(of), shape(of.rows, of.columns, kStepTerms * num_steps(of.pairs, of.num_pairs), 1) {
    CHECK(Main::can_implement(shape, {&product}));
    params = Main::to_underlying_arguments(shape, {&product}, nullptr);
    CHECK(params.tma_transaction_bytes == 2 * (size<0>(Tile{}) + size<1>(Tile{})) * kStepTerms);
  }

  // The tiles of a block, in its order; those beyond the result too.
  std::vector<std::pair<int, int>> work_of(const typename Scheduler::Params& schedule, dim3 grid,
                                           int x, int y) const {
    const bool is_along_n = schedule.raster_order_ == Scheduler::RasterOrder::AlongN;
    std::vector<std::pair<int, int>> tiles;
    uint64_t index = is_along_n ? x + uint64_t(y) * grid.x : x * uint64_t(grid.y) + y;
    for (; index < schedule.blocks_per_problem_; index += uint64_t(grid.x) * grid.y * grid.z) {
      uint64_t batch, rest;
      schedule.divmod_batch_(batch, rest, index);
      CHECK(batch == 0);
      const auto [m, n] = Scheduler::get_work_idx_m_and_n(
          schedule.divmod_cluster_shape_minor_.divide(rest), schedule.divmod_cluster_shape_major_,
          schedule.divmod_cluster_shape_minor_, schedule.divmod_cluster_blk_major_,
          schedule.log_swizzle_size_, schedule.raster_order_, x % kBlocks, 0);
      tiles.emplace_back(m, n);
    }
    return tiles;
  }

  // The tiles that `load` of this block fills: its own left one, its part of the right one in all
  // blocks of the cluster.
  template <class Blocks>
  void fill(const Load& load, Blocks& blocks, int rank, int m, int n) const {
    const auto& tiles = *static_cast<const typename Real::Params*>(load.tiles);
    const auto [gA, gB] = Main{}.load_init(shape, params);
    const auto left = tiles.tma_load_a.get_slice(0);
    const auto right = tiles.tma_load_b.get_slice(rank);
    play_copies(left.partition_S(gA(_, _, m, _, 0))(_, _, _, load.k),
                left.partition_D(blocks[rank].left())(_, _, _, load.buffer),
                tiles.tma_load_a.get_tma_descriptor(), 1);
    for (auto& block : blocks) {
      play_copies(right.partition_S(gB(_, _, n, _, 0))(_, _, _, load.k),
                  right.partition_D(block.right())(_, _, _, load.buffer),
                  tiles.tma_load_b.get_tma_descriptor(), kBlocks);
    }
  }

  // A cluster with its tiles: loads go ahead as far as buffers are free, at a pace of chance.
  void play_cluster(const std::vector<std::pair<int, int>>* work, std::vector<int>& visits) {
    auto blocks = std::make_unique<std::array<Block<Real>, kBlocks>>();
    const int total = num_steps(product.pairs, product.num_pairs), tiles = work[0].size();
    std::vector<std::pair<const void*, int>> wanted;
    for (int i = 0; i < product.num_pairs; ++i) {
      for (int k = 0; k * kStepTerms < product.pairs[i].terms; ++k) {
        wanted.emplace_back(&params.pairs[i].tiles, k);
      }
    }
    CHECK(total == static_cast<int>(wanted.size()));
    for (auto& block : *blocks) {
      State producer = cutlass::make_producer_start_state<cutlass::PipelineTmaAsync<kBuffers>>();
      for (int tile = 0; tile < tiles; ++tile) {
        Main{}.load(params, {&block.loads}, producer, 0, 0, 0, total, 0, 0, block.shared);
        producer.advance(total);
      }
      CHECK(static_cast<int>(block.loads.size()) == tiles * total);
    }
    State consumer;
    for (int asked = 0, done = 0; done < tiles * total;) {
      const int buffer = asked < tiles * total ? (*blocks)[0].loads[asked].buffer : 0;
      bool is_free = asked < tiles * total;
      for (auto& block : *blocks) is_free &= block.filled[buffer] == block.freed[buffer];
      if (is_free && (asked == done || random(0, 1))) {
        for (int rank = 0; rank < kBlocks; ++rank) {
          Block<Real>& block = (*blocks)[rank];
          const Load& load = block.loads[asked];
          // every step of every pair once and in order, in the buffer that is next, whose barrier
          // has turned over as often as it was filled
          CHECK(load.tiles == wanted[asked % total].first &&
                load.k == wanted[asked % total].second);
          CHECK(load.buffer == asked % kBuffers);
          CHECK(load.phase == (block.filled[buffer] % 2 ^ 1));
          const auto [m, n] = work[rank][asked / total];
          fill(load, *blocks, rank, m, n);
        }
        for (auto& block : *blocks) ++block.filled[buffer];
        ++asked;
        continue;
      }
      CHECK(done < asked);  // else loads wait for buffers that nobody frees
      const int read = consumer.index();
      for (int rank = 0; rank < kBlocks; ++rank) {
        Block<Real>& block = (*blocks)[rank];
        CHECK(block.filled[read] == block.freed[read] + 1);
        CHECK(consumer.phase() == (block.freed[read] % 2));
        block.multiply(read);
        ++block.freed[read];
        ++steps;
        if ((done + 1) % total == 0) finish(block, work[rank][done / total], visits);
      }
      ++done;
      ++consumer;
      if (done % total == 0) {  // as the kernel goes from one tile to the next
        CHECK(consumer.index() == done % kBuffers);
      }
    }
  }

  void finish(Block<Real>& block, std::pair<int, int> tile, std::vector<int>& visits);

  void play();
  const std::vector<double>* truth = nullptr;
};

template <bool kRightInRows>
void Kernel<kRightInRows>::finish(Block<Real>& block, std::pair<int, int> tile,
                                  std::vector<int>& visits) {
  constexpr int kRows = size<0>(Tile{}), kColumns = size<1>(Tile{});
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      const int m = tile.first * kRows + i, n = tile.second * kColumns + j;
      const float sum = block.sums[i * kColumns + j];
      if (m < product.rows && n < product.columns) {
        ++visits[m * product.columns + n];
        CHECK(sum == (*truth)[m * product.columns + n]);
      } else {
        CHECK(sum == 0.0f);  // what lies beyond was read as zero
      }
    }
  }
  std::fill(block.sums.begin(), block.sums.end(), 0.0f);
}

template <bool kRightInRows>
void Kernel<kRightInRows>::play() {
  const cutlass::KernelHardwareInfo hardware{0, product.multiprocessors};
  const typename Scheduler::Arguments options{kSwizzle};
  const auto schedule =
      Scheduler::to_underlying_arguments(shape, Tile{}, Cluster{}, hardware, options, nullptr);
  const dim3 grid =
      Scheduler::get_grid_shape(schedule, shape, Tile{}, Cluster{}, hardware, options);
  CHECK(grid.x % kBlocks == 0);
  std::vector<int> visits(product.rows * product.columns);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += kBlocks) {
      std::vector<std::pair<int, int>> work[kBlocks];
      for (int rank = 0; rank < kBlocks; ++rank) work[rank] = work_of(schedule, grid, x + rank, y);
      // blocks of a cluster work at tiles one above the other
      CHECK(work[0].size() == work[1].size());
      for (size_t i = 0; i < work[0].size(); ++i) {
        CHECK(work[1][i].first == work[0][i].first + 1 && work[1][i].second == work[0][i].second);
      }
      play_cluster(work, visits);
    }
  }
  for (int count : visits) CHECK(count == 1);
}

template <bool kRightInRows>
long play_a_product(int rows, int columns, const std::vector<int>& terms) {
  descriptors.clear();
  LoraProduct product = {};
  product.rows = rows;
  product.columns = columns;
  product.num_pairs = static_cast<int>(terms.size());
  product.multiprocessors = 2 * random(1, 4);
  std::vector<Numbers> lefts, rights;
  std::vector<double> truth(rows * columns);
  for (int length : terms) {
    lefts.emplace_back(rows, length);
    rights.emplace_back(kRightInRows ? columns : length, kRightInRows ? length : columns);
  }
  for (size_t i = 0; i < terms.size(); ++i) {
    product.pairs[i] = {lefts[i].operand(), rights[i].operand(), terms[i]};
    for (int m = 0; m < rows; ++m) {
      for (int k = 0; k < terms[i]; ++k) {
        for (int n = 0; n < columns; ++n) {
          truth[m * columns + n] +=
              lefts[i].at(m, k) * (kRightInRows ? rights[i].at(n, k) : rights[i].at(k, n));
        }
      }
    }
  }
  Kernel<kRightInRows> kernel(product);
  kernel.truth = &truth;
  kernel.play();
  return kernel.steps;
}

}  // namespace modxfer::cuda

int main(int, char** arguments) {
  using namespace modxfer::cuda;
  const int cases = std::atoi(arguments[1]);
  generator.seed(std::atoi(arguments[2]));
  long steps = 0;
  for (int i = 0; i < cases; ++i) {
    std::vector<int> terms(random(1, kMostPairs));
    for (int& length : terms) length = kAligned * random(1, random(0, 1) ? 4 : 30);
    const int rows = random(1, 400), columns = kAligned * random(1, 70);
    steps += i % 2 ? play_a_product<true>(rows, columns, terms)
                   : play_a_product<false>(rows, columns, terms);
  }
  std::printf("ok %d products, %ld steps\n", cases, steps);
}
