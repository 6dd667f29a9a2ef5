// The passes of LoRA linears on a GPU: the launches of lora_passes.h for tensors. Adapters and s
// are contiguous, wide tensors of any strides.

#include "lora_passes.h"

#include <torch/csrc/stable/library.h>

#include "tensors.cuh"

namespace modxfer::cuda {
namespace {

Wide wide(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1)}; }

int size_of(const Tensor& tensor, int64_t dim) { return static_cast<int>(tensor.size(dim)); }

Gpu current_gpu() { return {device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)}; }

auto launch_on(int64_t stream) {
  const int most_shared = current_gpu().most_shared;
  return [=](auto kernel, const device::Grid& grid, const auto& arguments) {
    STD_TORCH_CHECK(grid.shared_bytes <= most_shared, "expected a GPU whose blocks can have ",
                    grid.shared_bytes, " bytes of shared memory, got ", most_shared);
    check(device::launch(kernel, grid, reinterpret_cast<cudaStream_t>(stream), arguments));
  };
}

void check_share(int64_t share_rows) {
  STD_TORCH_CHECK(share_rows > 0 && share_rows % kBackwardRows<device::Bf16> == 0,
                  "share_rows: expected a multiple of 64, got ", share_rows);
}

}  // namespace

// writes s [M, sum R] and, where given, bits [T, M, ceil(K / 32)] from the seed
void lora_shrink_cuda(Tensor x, std::vector<Tensor> lora_a, std::vector<double> scales,
                      std::vector<int64_t> thresholds, std::optional<Tensor> seed,
                      std::optional<Tensor> bits, Tensor s, int64_t stream) {
  const ShrinkCall call{kind_of(x),         kind_of(s),    wide(x),
                        size_of(x, 0),      size_of(x, 1), at<uint64_t>(seed),
                        at<uint32_t>(bits), s.data_ptr()};
  std::vector<ShrinkTarget> targets;
  for (size_t t = 0; t < lora_a.size(); ++t) {
    targets.push_back({lora_a[t].data_ptr(), size_of(lora_a[t], 0), static_cast<float>(scales[t]),
                       static_cast<uint32_t>(thresholds[t])});
  }
  shrink(call, targets, current_gpu(), launch_on(stream));
}

// writes partial sums ds [ceil(N / 256), M, R] and db [ceil(M / share_rows), N, R] of each target
// that has them; columns: where each target's ranks begin in s
void lora_ds_db_cuda(std::vector<Tensor> dys, std::vector<Tensor> lora_b,
                     std::vector<int64_t> columns, std::vector<double> scales,
                     std::optional<Tensor> s, int64_t share_rows,
                     std::vector<std::optional<Tensor>> ds, std::vector<std::optional<Tensor>> db,
                     int64_t stream) {
  check_share(share_rows);
  const DsDbCall call{kind_of(dys[0]),    kind_of(lora_b[0]),
                      size_of(dys[0], 0), static_cast<int>(share_rows),
                      at<void>(s),        s.has_value() ? size_of(*s, 1) : 0};
  std::vector<DyTarget> targets;
  for (size_t t = 0; t < dys.size(); ++t) {
    STD_TORCH_CHECK(
        !ds[t].has_value() || size_of(*ds[t], 0) == blocks_of(lora_b[t].size(0), kBackwardColumns),
        "ds: expected a partial sum for each ", kBackwardColumns, " columns");
    targets.push_back({wide(dys[t]), lora_b[t].data_ptr(), size_of(lora_b[t], 0),
                       size_of(lora_b[t], 1), static_cast<int>(columns[t]),
                       static_cast<float>(scales[t]), at<float>(ds[t]), at<float>(db[t])});
  }
  ds_db(call, targets, launch_on(stream));
}

// writes partial sums parts [ceil(M / share_rows), R, K] of each target; masks: [M, bytes] or none
void lora_da_cuda(Tensor x, std::vector<Tensor> ds, std::vector<std::optional<Tensor>> masks,
                  int64_t share_rows, std::vector<Tensor> parts, int64_t stream) {
  check_share(share_rows);
  const DaCall call{kind_of(x),    kind_of(ds[0]), wide(x),
                    size_of(x, 0), size_of(x, 1),  static_cast<int>(share_rows)};
  std::vector<DaTarget> targets;
  for (size_t t = 0; t < ds.size(); ++t) {
    targets.push_back({ds[t].data_ptr(), at<uint8_t>(masks[t]), size_of(ds[t], 1),
                       static_cast<float*>(parts[t].data_ptr())});
  }
  da(call, targets, current_gpu(), launch_on(stream));
}

// outs[i] = parts[i].sum(0); all outs have one dtype
void lora_reduce_cuda(std::vector<Tensor> parts, std::vector<Tensor> outs, int64_t stream) {
  std::vector<Parts> all;
  for (size_t i = 0; i < parts.size(); ++i) {
    all.push_back({static_cast<const float*>(parts[i].data_ptr()), outs[i].data_ptr(),
                   outs[i].numel(), size_of(parts[i], 0)});
  }
  reduce(kind_of(outs[0]), all, launch_on(stream));
}

}  // namespace modxfer::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(modxfer_csrc, m) {
  m.def(
      "lora_shrink_cuda(Tensor x, Tensor[] lora_a, float[] scales, int[] thresholds, Tensor? seed, "
      "Tensor(a!)? bits, Tensor(b!) s, int stream) -> ()");
  m.def(
      "lora_ds_db_cuda(Tensor[] dys, Tensor[] lora_b, int[] columns, float[] scales, Tensor? s, "
      "int share_rows, Tensor?[] ds, Tensor?[] db, int stream) -> ()");
  m.def(
      "lora_da_cuda(Tensor x, Tensor[] ds, Tensor?[] masks, int share_rows, Tensor(a!)[] parts, "
      "int stream) -> ()");
  m.def("lora_reduce_cuda(Tensor[] parts, Tensor(a!)[] outs, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CUDA, m) {
  m.impl("lora_shrink_cuda", TORCH_BOX(&modxfer::cuda::lora_shrink_cuda));
  m.impl("lora_ds_db_cuda", TORCH_BOX(&modxfer::cuda::lora_ds_db_cuda));
  m.impl("lora_da_cuda", TORCH_BOX(&modxfer::cuda::lora_da_cuda));
  m.impl("lora_reduce_cuda", TORCH_BOX(&modxfer::cuda::lora_reduce_cuda));
}
