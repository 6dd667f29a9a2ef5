// Sums and products of rows on a CPU: dtype and thread handling around the loops of
// correlation_isa.cpp.
//
// Threads share the columns, and every column is summed by one of them from the first row to the
// last: the same bits for any number of threads.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "modxfer/correlation.h"
#include "modxfer/ops.h"
#include "rows.h"

namespace modxfer {
namespace {

using torch::headeronly::ScalarType;

// Columns of fp32 rows that a thread takes at once: a group of them stays in the first cache.
constexpr int64_t kColumns = 256;

void check_double(const Tensor& tensor, int64_t numel) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() &&
                      tensor.numel() == numel,
                  "shift, sums: expected contiguous float64, one or two a column");
}

void centre_columns(Tensor x, const bool* mask, const double* shift, Tensor centred, int64_t first,
                    int64_t count, double* sum, double* square) {
  const CorrelationKernels& kernels = correlation_kernels();
  const int64_t N = x.size(0);
  const Rows source(torch::stable::narrow(x, 1, first, count));
  const Rows target(torch::stable::narrow(centred, 1, first, count));
  std::vector<float> origin(shift + first, shift + first + count);
  std::vector<float> buffer(source.buffer_size() * kCorrelationGroup);
  for (int64_t row = 0; row < N; row += kCorrelationGroup) {
    const int rows = static_cast<int>(std::min<int64_t>(kCorrelationGroup, N - row));
    const float* from[kCorrelationGroup];
    float* to[kCorrelationGroup];
    for (int i = 0; i < rows; ++i) {
      const bool counts = mask == nullptr || mask[row + i];
      // a row that does not count may hold anything: what is read in its place is at the shift
      from[i] =
          counts ? source.read(row + i, buffer.data() + i * source.buffer_size()) : origin.data();
      to[i] = target.target(row + i, nullptr);
    }
    if (rows == kCorrelationGroup) {
      kernels.centre_group(from, origin.data(), count, to, sum + first, square + first);
    } else {
      for (int i = 0; i < rows; ++i) {
        kernels.centre_row(from + i, origin.data(), count, to + i, sum + first, square + first);
      }
    }
  }
}

}  // namespace

void correlation_centre(Tensor x, std::optional<Tensor> mask, Tensor shift, Tensor centred,
                        Tensor sums) {
  const int64_t N = x.size(0), D = x.size(1);
  STD_TORCH_CHECK(centred.dim() == 2 && centred.size(0) == N && centred.size(1) == D &&
                      centred.scalar_type() == ScalarType::Float,
                  "centred: expected float32 in the shape of x");
  check_double(shift, D);
  check_double(sums, 2 * D);
  const bool* counts = nullptr;
  if (mask.has_value()) {
    STD_TORCH_CHECK(
        mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == N,
        "mask: expected contiguous bool, one a row");
    counts = static_cast<const bool*>(mask->data_ptr());
  }
  const auto* origin = static_cast<const double*>(shift.data_ptr());
  auto* sum = static_cast<double*>(sums.data_ptr());
  const int64_t blocks = (D + kColumns - 1) / kColumns;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns, count = std::min(kColumns, D - first);
      centre_columns(x, counts, origin, centred, first, count, sum, sum + D);
    }
  });
}

void correlation_add(Tensor tile, Tensor total) {
  const int64_t M = total.size(0), D = total.size(1);
  STD_TORCH_CHECK(tile.scalar_type() == ScalarType::Float && tile.is_contiguous() &&
                      tile.dim() == 2 && tile.size(0) == M && tile.size(1) == D,
                  "tile: expected contiguous float32 in the shape of total");
  STD_TORCH_CHECK(total.scalar_type() == ScalarType::Double && (D == 1 || total.stride(1) == 1),
                  "total: expected float64 with contiguous rows");
  const auto* source = static_cast<const float*>(tile.data_ptr());
  auto* target = static_cast<double*>(total.data_ptr());
  const int64_t stride = total.stride(0);
  const CorrelationKernels& kernels = correlation_kernels();
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(D, 1));
  torch::stable::parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernels.add_to_double(source + row * D, D, target + row * stride);
    }
  });
}

}  // namespace modxfer
