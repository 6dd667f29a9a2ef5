// The KD rows on a GPU: the launch of kd_loss_rows.cuh for tensors.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "kd_loss_plan.h"
#include "kd_loss_rows.cuh"
#include "modxfer/kd_spec.h"

namespace modxfer::cuda {
namespace {

using torch::headeronly::ScalarType;

Kind kind_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Kind::kFloat;
    case ScalarType::BFloat16:
      return Kind::kBf16;
    case ScalarType::Half:
      return Kind::kHalf;
    default:
      STD_TORCH_CHECK(false, "logits: expected float32, bfloat16 or float16");
  }
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "kd_loss: ", cudaGetErrorString(error));
}

template <class T>
T* at(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

using Kernel = void (*)(KdRows);

template <bool kIsResident, int64_t... kIds>
Kernel kernel_of(Divergence divergence, std::integer_sequence<int64_t, kIds...>) {
  constexpr Kernel kKernels[] = {kd_loss_rows<static_cast<Divergence>(kIds), kIsResident>...,
                                 kd_loss_rows<Divergence::kCount, kIsResident>};
  const auto id = divergence == Divergence::kCount ? kNumSums : static_cast<int64_t>(divergence);
  STD_TORCH_CHECK(id <= kNumSums, "divergences: expected sums over the classes");
  return kKernels[id];
}

Kernel kernel_of(Divergence divergence, bool is_resident) {
  constexpr auto kIds = std::make_integer_sequence<int64_t, kNumSums>{};
  return is_resident ? kernel_of<true>(divergence, kIds) : kernel_of<false>(divergence, kIds);
}

void launch_rows(const KdRows& rows, cudaStream_t stream) {
  if (rows.rows == 0) return;
  int device = 0, multiprocessors = 0, major = 0, most_shared = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const auto bytes_of = [&](int cluster, bool is_resident) {
    return shared_bytes(rows.classes, cluster, rows.logits, is_resident);
  };
  const Plan plan = plan_of(rows.rows, multiprocessors, major >= 9 ? most_shared : 0,
                            [&](int cluster) { return bytes_of(cluster, true); });
  const Kernel kernel = kernel_of(rows.spec.divergence, plan.is_resident);
  const device::Grid grid{plan.blocks, plan.threads, plan.cluster,
                          bytes_of(plan.cluster, plan.is_resident)};
  check(device::launch(kernel, grid, stream, rows));
}

}  // namespace

// As kd_loss_fwd_bwd of modxfer/ops.h, on the stream of this number; without dlogits the losses
// alone. -> kd [M], ce [M], stats [M, 6]
std::tuple<Tensor, Tensor, Tensor> kd_loss_cuda(
    Tensor student_logits, Tensor teacher_logits, std::optional<Tensor> labels,
    std::optional<Tensor> row_weights, std::vector<int64_t> divergences,
    std::vector<double> numbers, std::vector<double> bends, std::optional<Tensor> softening,
    std::optional<Tensor> dlogits, std::optional<Tensor> extras, int64_t stream) {
  const int64_t M = student_logits.size(0), V = student_logits.size(1);
  const Spec owner(divergences, numbers, V, softening, M);
  const KdSpec& spec = owner;
  STD_TORCH_CHECK(spec.num_parts <= kMaxParts, "divergences: expected at most eight in a sum");
  Tensor kd = torch::stable::new_empty(student_logits, {M}, ScalarType::Float);
  Tensor ce = torch::stable::new_empty(student_logits, {M}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(student_logits, {M, 6}, ScalarType::Float);
  KdRows rows = {};
  rows.student = student_logits.data_ptr();
  rows.teacher = teacher_logits.data_ptr();
  rows.student_stride = student_logits.stride(0);
  rows.teacher_stride = teacher_logits.stride(0);
  rows.logits = kind_of(student_logits);
  rows.labels = at<int64_t>(labels);
  rows.row_weights = at<float>(row_weights);
  rows.softening = at<float>(softening);
  rows.kd = static_cast<float*>(kd.data_ptr());
  rows.ce = static_cast<float*>(ce.data_ptr());
  rows.stats = static_cast<float*>(stats.data_ptr());
  rows.extras = at<float>(extras);
  rows.num_extras = extras.has_value() ? static_cast<int>(extras->size(1)) : 0;
  rows.dlogits = at<void>(dlogits);
  if (dlogits.has_value()) {
    rows.dlogits_stride = dlogits->stride(0);
    rows.kind = kind_of(*dlogits);
  }
  rows.rows = static_cast<int>(M);
  rows.classes = static_cast<int>(V);
  if (!bends.empty()) {
    rows.student_bend = {static_cast<float>(bends[0]), static_cast<float>(bends[1])};
    rows.teacher_bend = {static_cast<float>(bends[2]), static_cast<float>(bends[3])};
  }
  rows.spec = spec;
  std::copy_n(spec.parts, spec.num_parts, rows.parts);
  launch_rows(rows, reinterpret_cast<cudaStream_t>(stream));
  return {kd, ce, stats};
}

}  // namespace modxfer::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(modxfer_csrc, m) {
  m.def(
      "kd_loss_cuda(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "Tensor? row_weights, int[] divergences, float[] numbers, float[] bends, Tensor? softening, "
      "Tensor(a!)? dlogits, Tensor(b!)? extras, int stream) -> (Tensor kd, Tensor ce, Tensor "
      "stats)");
}

STABLE_TORCH_LIBRARY_IMPL(modxfer_csrc, CUDA, m) {
  m.impl("kd_loss_cuda", TORCH_BOX(&modxfer::cuda::kd_loss_cuda));
}
