// What the CUDA kernels are written in: a thread, its warp, block and cluster, and how they meet.
//
// nvcc reads CUDA's own instructions here, PTX included, and no kernel has any of its own; a C++
// compiler reads the emulator of csrc/testing, which says what each function does.
#pragma once

#ifndef __CUDACC__

#include "emulator.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <tuple>
#include <utility>

#include "known.h"

#define MODXFER_DEVICE __device__ __forceinline__
#define MODXFER_BOTH __host__ __device__ __forceinline__
#define MODXFER_KERNEL static __global__
// Before a kernel's name: registers for so many threads a block, and blocks a multiprocessor.
#define MODXFER_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define MODXFER_UNROLL _Pragma("unroll")
#define MODXFER_UNROLL_BY_8 _Pragma("unroll 8")
#define MODXFER_ARGUMENT const __grid_constant__

namespace modxfer::device {

struct Grid {
  int blocks;
  int threads;
  int cluster;
  int shared_bytes;
};

constexpr uint32_t kAllLanes = 0xFFFFFFFF;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MODXFER_HAS_CLUSTERS 1
#endif

MODXFER_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MODXFER_DEVICE int block_size() { return static_cast<int>(blockDim.x); }

MODXFER_DEVICE int cluster_rank() {
#ifdef MODXFER_HAS_CLUSTERS
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

MODXFER_DEVICE int cluster_size() {
#ifdef MODXFER_HAS_CLUSTERS
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

MODXFER_DEVICE int cluster_index() { return static_cast<int>(blockIdx.x) / cluster_size(); }
MODXFER_DEVICE int num_clusters() { return static_cast<int>(gridDim.x) / cluster_size(); }

MODXFER_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

MODXFER_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

MODXFER_DEVICE void sync_warp() { __syncwarp(); }
MODXFER_DEVICE void sync_block() { __syncthreads(); }

MODXFER_DEVICE void arrive_cluster() {
#ifdef MODXFER_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

MODXFER_DEVICE void wait_cluster() {
#ifdef MODXFER_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

MODXFER_DEVICE void sync_cluster() {
  arrive_cluster();
  wait_cluster();
}

template <class T>
MODXFER_DEVICE T from_lane(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

template <class T>
MODXFER_DEVICE T from_lane_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

MODXFER_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }

template <class T>
MODXFER_DEVICE T* of_rank(T* shared, int rank) {
#ifdef MODXFER_HAS_CLUSTERS
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return shared;
#endif
}

// Barriers and bulk copies: of devices that have clusters, and a fault on others, which launch no
// kernel that reaches one.
struct Barrier {
  uint64_t state;

  MODXFER_DEVICE void init(int arrivals) {
#ifdef MODXFER_HAS_CLUSTERS
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals));
#else
    __trap();
#endif
  }
  MODXFER_DEVICE void arrive() {
#ifdef MODXFER_HAS_CLUSTERS
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&state)) : "memory");
#else
    __trap();
#endif
  }
  MODXFER_DEVICE void arrive_expecting(int bytes) {
#ifdef MODXFER_HAS_CLUSTERS
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&state)),
                 "r"(bytes)
                 : "memory");
#else
    __trap();
#endif
  }
  MODXFER_DEVICE void wait(int parity) {
#ifdef MODXFER_HAS_CLUSTERS
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(&state)),
        "r"(parity)
        : "memory");
#else
    __trap();
#endif
  }
};

MODXFER_DEVICE void fence_barriers() {
#ifdef MODXFER_HAS_CLUSTERS
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
}

MODXFER_DEVICE void fence_copies() {
#ifdef MODXFER_HAS_CLUSTERS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

MODXFER_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Barrier& barrier) {
#ifdef MODXFER_HAS_CLUSTERS
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(&barrier.state))
      : "memory");
#else
  __trap();
#endif
}

MODXFER_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
MODXFER_DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
MODXFER_DEVICE void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

template <class T>
MODXFER_DEVICE T atomic_add(T* target, T value) {
  return atomicAdd(target, value);
}
template <class T>
MODXFER_DEVICE T atomic_max(T* target, T value) {
  return atomicMax(target, value);
}

MODXFER_DEVICE float log(float x) { return logf(x); }
MODXFER_DEVICE float log1p(float x) { return log1pf(x); }
MODXFER_DEVICE float exp(float x) { return expf(x); }
MODXFER_DEVICE float sqrt(float x) { return sqrtf(x); }
MODXFER_DEVICE float power_of_2(float x) {
  return __uint_as_float(__float_as_uint(x) & 0x7F800000);
}
// a b, rounded: never part of a fused multiply-add.
MODXFER_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
MODXFER_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MODXFER_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

using Bf16 = __nv_bfloat16;
MODXFER_DEVICE Bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }
using Half = __half;
MODXFER_DEVICE Half to_half(float x) { return __float2half_rn(x); }
MODXFER_DEVICE float to_float(Half x) { return __half2float(x); }
MODXFER_DEVICE float to_float(Bf16 x) { return __bfloat162float(x); }

MODXFER_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
MODXFER_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// A half-precision number from its bits, and back.
MODXFER_DEVICE float from_bits(uint16_t bits, bool is_bf16) {
  return is_bf16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                 : __half2float(__ushort_as_half(bits));
}

MODXFER_DEVICE uint16_t to_bits(float x, bool is_bf16) {
  return is_bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                 : __half_as_ushort(__float2half_rn(x));
}

#define MODXFER_MULTIPLY_ADD(shape, type)                                    \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type                \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class T>
MODXFER_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
MODXFER_DEVICE void multiply_add<Bf16>(float (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  MODXFER_MULTIPLY_ADD("m16n8k16", "bf16");
}
template <>
MODXFER_DEVICE void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  MODXFER_MULTIPLY_ADD("m16n8k16", "f16");
}
MODXFER_DEVICE void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
  MODXFER_MULTIPLY_ADD("m16n8k8", "tf32");
}
#undef MODXFER_MULTIPLY_ADD

MODXFER_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
MODXFER_DEVICE float from_tf32(uint32_t bits) { return __uint_as_float(bits); }

MODXFER_DEVICE uint64_t multiply_wide(uint32_t x, uint32_t y) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(x), "r"(y));
  return product;
}

MODXFER_DEVICE uint32_t negative_halves(int low, int high) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, %2, 0xFFBB;" : "=r"(mask) : "r"(low), "r"(high));
  return mask;
}

// Registers of a thread of the kernel on the current device. Asked once for each of both, and from
// then on its blocks may have all shared memory there is: host threads launch it with several
// sizes.
inline cudaError_t prepare(const void* kernel, int& registers) {
  static Known<std::pair<const void*, int>, int> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  return known.find({kernel, device}, registers, [&](int& found) {
    cudaFuncAttributes attributes = {};
    int most_shared = 0;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most_shared - static_cast<int>(attributes.sharedSizeBytes));
    }
    found = attributes.numRegs;
    return error;
  });
}

struct LaunchConfig {
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = {};

  // Refers to itself, so it stays where it is.
  LaunchConfig(const Grid& grid, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    config.gridDim = dim3(grid.blocks);
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// Clusters of such a grid, however many blocks it has, that the current device runs at once: 0
// where it runs none.
inline cudaError_t clusters_at_once(const void* kernel, Grid grid, int& clusters) {
  static Known<std::tuple<const void*, int, int, int, int>, int> known;
  int device = 0, registers = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = prepare(kernel, registers)) return error;
  grid.blocks = grid.cluster;
  const auto ask = [&](int& found) {
    if (grid.cluster > 1) {
      const LaunchConfig of(grid, nullptr);
      const cudaError_t error = cudaOccupancyMaxActiveClusters(&found, kernel, &of.config);
      if (error != cudaErrorInvalidClusterSize) return error;
      found = 0;
      return cudaSuccess;
    }
    int blocks = 0, multiprocessors = 0;
    cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, grid.threads,
                                                                      grid.shared_bytes);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    found = blocks * multiprocessors;
    return error;
  };
  return known.find({kernel, device, grid.cluster, grid.threads, grid.shared_bytes}, clusters, ask);
}

// On the stream; blocks come in clusters where the device has them.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   Arguments... arguments) {
  int registers = 0;
  const cudaError_t error = prepare(reinterpret_cast<const void*>(kernel), registers);
  if (error != cudaSuccess) return error;
  const LaunchConfig of(grid, stream);
  return cudaLaunchKernelEx(&of.config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace modxfer::device

#endif
