// LoRA linears on a CPU: what a frozen linear's GEMM does not do, in one pass over the rows. dtype
// and thread handling around the kernels of lora_linear_isa.cpp.
//
// M rows   K, N widths   R rank   T targets; notation of kernels/lora_linear/op.py
//
//   forward    x -> mask bits, s and y = bias + residual + s B^T, on which the base GEMM adds
//   backward   dy -> ds and dB; x, ds -> dA and dx = mask(ds A), on which the base GEMM adds
//
// A block of rows passes through all of it while it is in the second cache. Neither mask(x) nor
// ds leaves the block. Gradients of adapters are summed over fixed chunks of rows and then over the
// chunks, whichever thread took which: the same bits for any number of threads.

#include "modxfer/lora_linear.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "modxfer/ops.h"
#include "row_blocks.h"
#include "rows.h"

namespace modxfer {
namespace {

using torch::headeronly::ScalarType;

std::vector<int64_t> rank_offsets(const std::vector<Tensor>& lora_a) {
  std::vector<int64_t> offsets{0};
  for (const Tensor& a : lora_a) offsets.push_back(offsets.back() + a.size(0));
  return offsets;
}

// Bits of the targets of a tensor [T, M, words]; nothing for a target that drops nothing.
class Masks {
 public:
  Masks(const std::optional<Tensor>& bits, const std::vector<int64_t>& thresholds)
      : thresholds_(thresholds) {
    if (!bits.has_value()) return;
    STD_TORCH_CHECK(bits->scalar_type() == ScalarType::Int && bits->is_contiguous() &&
                        bits->dim() == 3 &&
                        bits->size(0) == static_cast<int64_t>(thresholds.size()),
                    "bits: expected contiguous int32 [T, M, words]");
    words_ = static_cast<uint32_t*>(bits->data_ptr());
    rows_ = bits->size(1);
    num_words_ = bits->size(2);
  }

  Mask at(size_t target, int64_t row) const {
    return thresholds_[target] == 0 ? Mask{nullptr, 0} : Mask{words(target, row), num_words_};
  }

  void draw(uint64_t seed, size_t target, int64_t row, int64_t rows) const {
    if (thresholds_[target] == 0) {
      std::fill_n(words(target, row), rows * num_words_, ~uint32_t{0});
      return;
    }
    const DropoutKey key{seed, static_cast<uint32_t>(target),
                         static_cast<uint32_t>(thresholds_[target])};
    lora_kernels().draw_mask(key, row, rows, num_words_, words(target, row), num_words_);
  }

  bool given() const { return words_ != nullptr; }

 private:
  uint32_t* words(size_t target, int64_t row) const {
    return words_ + (static_cast<int64_t>(target) * rows_ + row) * num_words_;
  }

  const std::vector<int64_t>& thresholds_;
  uint32_t* words_ = nullptr;
  int64_t rows_ = 0, num_words_ = 0;
};

void add_rows(Matrix addend, int64_t rows, int64_t width, float* y, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* source = addend.data + row * addend.stride;
    float* target = y + row * stride;
    for (int64_t i = 0; i < width; ++i) target[i] += source[i];
  }
}

}  // namespace

Tensor lora_shrink(Tensor x, Tensor lora_a, double scale) {
  const int64_t M = x.size(0), K = x.size(1), R = lora_a.size(0);
  STD_TORCH_CHECK(lora_a.dim() == 2 && lora_a.size(1) == K, "lora_a: expected [R, K]");
  const Buffer panels = pack_a(lora_a);
  Tensor s = torch::stable::new_empty(x, {M, R}, ScalarType::Float);
  auto* s_data = static_cast<float*>(s.data_ptr());
  const int64_t block = rows_per_block(K);
  torch::stable::parallel_for(0, ceil_div(M, block), 1, [&](int64_t begin, int64_t end) {
    RowBlock x_rows(x, block);
    for (int64_t first = begin * block; first < std::min(M, end * block); first += block) {
      const int64_t rows = std::min(block, M - first);
      lora_kernels().shrink(x_rows.read(first, rows), Mask{nullptr, 0}, rows, K, panels.data(), R,
                            static_cast<float>(scale), s_data + first * R, R);
    }
  });
  return s;
}

void lora_linear_rows_fwd(Tensor x, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                          std::vector<std::optional<Tensor>> biases, std::optional<Tensor> residual,
                          std::vector<double> scales, std::vector<int64_t> thresholds,
                          std::optional<Tensor> seed, std::optional<Tensor> bits, Tensor s,
                          std::vector<Tensor> ys) {
  const int64_t M = x.size(0), K = x.size(1);
  const size_t T = lora_a.size();
  const LoraKernels& kernels = lora_kernels();
  const std::vector<int64_t> offsets = rank_offsets(lora_a);
  const int64_t s_width = offsets.back();
  const Masks masks(bits, thresholds);
  const uint64_t key = seed.has_value() ? *static_cast<const uint64_t*>(seed->data_ptr()) : 0;

  std::vector<Buffer> a_panels, b_panels;
  std::vector<std::vector<float>> bias_rows(T);
  for (size_t t = 0; t < T; ++t) {
    a_panels.push_back(pack_a(lora_a[t]));
    b_panels.push_back(pack_b(lora_b[t]));
    if (!biases[t].has_value()) continue;
    Tensor row = torch::stable::view(*biases[t], {1, biases[t]->numel()});
    bias_rows[t].resize(row.numel());
    std::copy_n(Rows(row).read(0, bias_rows[t].data()), row.numel(), bias_rows[t].data());
  }

  const int64_t block = rows_per_block(K);
  torch::stable::parallel_for(0, ceil_div(M, block), 1, [&](int64_t begin, int64_t end) {
    RowBlock x_rows(x, block), s_rows(s, block);
    RowBlocks y_rows = row_blocks(ys, block);
    RowBlocks residual_rows = row_blocks(
        residual.has_value() ? std::vector<Tensor>{*residual} : std::vector<Tensor>{}, block);
    for (int64_t first = begin * block; first < std::min(M, end * block); first += block) {
      const int64_t rows = std::min(block, M - first);
      const Matrix x_block = x_rows.read(first, rows);
      float* s_block = s_rows.target(first);
      for (size_t t = 0; t < T; ++t) {
        const int64_t N = lora_b[t].size(0), R = lora_a[t].size(0);
        if (masks.given()) masks.draw(key, t, first, rows);
        kernels.shrink(x_block, masks.at(t, first), rows, K, a_panels[t].data(), R,
                       static_cast<float>(scales[t]), s_block + offsets[t], s_width);
        float* y = y_rows[t].target(first);
        const int64_t y_stride = y_rows[t].stride();
        Matrix init{biases[t].has_value() ? bias_rows[t].data() : nullptr, 0};
        if (residual.has_value()) init = residual_rows[0].read(first, rows);
        kernels.expand({s_block + offsets[t], s_width}, rows, R, b_panels[t].data(), N,
                       Mask{nullptr, 0}, init, y, y_stride);
        if (residual.has_value() && biases[t].has_value()) {
          add_rows({bias_rows[t].data(), 0}, rows, N, y, y_stride);
        }
        y_rows[t].commit(first, rows);
      }
      s_rows.commit(first, rows);
    }
  });
}

void lora_linear_rows_bwd(std::vector<Tensor> dys, std::optional<Tensor> x,
                          std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                          std::vector<double> scales, std::vector<int64_t> thresholds,
                          std::optional<Tensor> s, std::optional<Tensor> bits,
                          std::optional<Tensor> dx, std::vector<std::optional<Tensor>> da,
                          std::vector<std::optional<Tensor>> db) {
  const int64_t M = dys[0].size(0), K = lora_a[0].size(1);
  const size_t T = lora_a.size();
  const LoraKernels& kernels = lora_kernels();
  const std::vector<int64_t> offsets = rank_offsets(lora_a);
  const int64_t s_width = offsets.back();
  const Masks masks(bits, thresholds);

  const int64_t chunk_rows = rows_per_chunk(M), chunks = ceil_div(M, chunk_rows);
  std::vector<Buffer> a_panels, b_panels;
  std::vector<OuterSums> da_sums, db_sums;
  int64_t widest = K;
  bool any_da = false, any_db = false;
  for (size_t t = 0; t < T; ++t) {
    const int64_t N = lora_b[t].size(0), R = lora_a[t].size(0);
    a_panels.push_back(dx.has_value() ? pack_a(lora_a[t]) : Buffer(0));
    b_panels.push_back(dx.has_value() || da[t].has_value() ? pack_b(lora_b[t]) : Buffer(0));
    da_sums.emplace_back(da[t].has_value() ? chunks : 0, R, K);
    db_sums.emplace_back(db[t].has_value() ? chunks : 0, R, N);
    any_da |= da[t].has_value();
    any_db |= db[t].has_value();
    widest = std::max(widest, N);
  }

  const int64_t block = rows_per_block(widest);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    RowBlocks dy_rows = row_blocks(dys, block);
    RowBlocks x_rows = row_blocks(any_da ? std::vector<Tensor>{*x} : std::vector<Tensor>{}, block);
    RowBlocks s_rows = row_blocks(any_db ? std::vector<Tensor>{*s} : std::vector<Tensor>{}, block);
    RowBlocks dx_rows =
        row_blocks(dx.has_value() ? std::vector<Tensor>{*dx} : std::vector<Tensor>{}, block);
    const Buffer ds(block * s_width);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t chunk_first = chunk * chunk_rows, last = std::min(M, chunk_first + chunk_rows);
      for (int64_t first = chunk_first; first < last; first += block) {
        const int64_t rows = std::min(block, last - first);
        const Matrix s_block = any_db ? s_rows[0].read(first, rows) : Matrix{nullptr, 0};
        for (size_t t = 0; t < T; ++t) {
          const int64_t N = lora_b[t].size(0), R = lora_a[t].size(0);
          const bool needs_ds = dx.has_value() || da[t].has_value();
          if (!needs_ds && !db[t].has_value()) continue;
          const Matrix dy = dy_rows[t].read(first, rows);
          if (needs_ds) {
            kernels.shrink(dy, Mask{nullptr, 0}, rows, N, b_panels[t].data(), R,
                           static_cast<float>(scales[t]), ds.data() + offsets[t], s_width);
          }
          if (db[t].has_value()) {
            kernels.outer({s_block.data + offsets[t], s_block.stride}, dy, Mask{nullptr, 0}, rows,
                          R, N, first != chunk_first, db_sums[t].chunk(chunk));
          }
        }
        if (any_da) {
          const Matrix x_block = x_rows[0].read(first, rows);
          for (size_t t = 0; t < T; ++t) {
            if (!da[t].has_value()) continue;
            kernels.outer({ds.data() + offsets[t], s_width}, x_block, masks.at(t, first), rows,
                          lora_a[t].size(0), K, first != chunk_first, da_sums[t].chunk(chunk));
          }
        }
        if (dx.has_value()) {
          float* target = dx_rows[0].target(first);
          const int64_t stride = dx_rows[0].stride();
          for (size_t t = 0; t < T; ++t) {
            kernels.expand({ds.data() + offsets[t], s_width}, rows, lora_a[t].size(0),
                           a_panels[t].data(), K, masks.at(t, first),
                           {t == 0 ? nullptr : target, stride}, target, stride);
          }
          dx_rows[0].commit(first, rows);
        }
      }
    }
  });
  for (size_t t = 0; t < T; ++t) {
    if (da[t].has_value()) da_sums[t].write(*da[t], da[t]->stride(0), da[t]->stride(1));
    if (db[t].has_value()) db_sums[t].write(*db[t], db[t]->stride(1), db[t]->stride(0));
  }
}

}  // namespace modxfer
