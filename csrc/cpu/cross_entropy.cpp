// Cross entropy rows on a CPU: dtype and thread handling around the kernels of
// cross_entropy_isa.cpp.

#include "modxfer/cross_entropy.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "bent_rows.h"
#include "labels.h"
#include "modxfer/ops.h"
#include "rows.h"

namespace modxfer {
namespace {

using torch::headeronly::ScalarType;

struct CeOptions {
  double ce_weight;
  double label_smoothing;
  double z_loss_weight;
};

// Where the by-products of a row go: log sum e^z, and where it is asked for the label's
// log-probability, whether it is the largest, and the entropy.
class Extras {
 public:
  Extras(const std::optional<Tensor>& extras, int64_t rows) {
    if (!extras.has_value()) return;
    STD_TORCH_CHECK(extras->scalar_type() == ScalarType::Float && extras->is_contiguous() &&
                        extras->dim() == 2 && extras->size(0) == rows &&
                        (extras->size(1) == 1 || extras->size(1) == 4),
                    "extras: expected contiguous float32 [M, 1] or [M, 4]");
    data_ = static_cast<float*>(extras->data_ptr());
    width_ = extras->size(1);
  }

  bool has_all() const { return width_ == 4; }

  void put(int64_t row, float max, double log_d, double entropy, bool has_label,
           float z_label) const {
    if (data_ == nullptr) return;
    float* target = data_ + row * width_;
    target[0] = static_cast<float>(max + log_d);
    if (!has_all()) return;
    target[1] = has_label ? static_cast<float>((static_cast<double>(z_label) - max) - log_d) : 0.0f;
    target[2] = has_label && z_label == max ? 1.0f : 0.0f;
    target[3] = static_cast<float>(entropy);
  }

 private:
  float* data_ = nullptr;
  int64_t width_ = 0;
};

// Rows a thread takes at least: about 64k logits.
int64_t grain(int64_t vocab_size) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(vocab_size, 1));
}

// Losses of all rows, and where row_weights are given their gradients.
Tensor run(const Tensor& logits, const std::optional<Tensor>& labels,
           const std::optional<Tensor>& row_weights, const CeOptions& options,
           const std::vector<double>& bends, const Biases& biases,
           const std::optional<Tensor>& dlogits, const std::optional<Tensor>& extras) {
  const int64_t M = logits.size(0), V = logits.size(1);
  const BentRows rows(logits, Bends(bends, biases, V).student);
  const Rows grads(dlogits.has_value() ? *dlogits : logits);
  const Labels label_of(labels, M, V);
  const Extras more(extras, M);
  const CeRowKernels& kernels = ce_row_kernels();
  const bool keeps = dlogits.has_value(), smooths = options.label_smoothing != 0.0;
  const auto sums_of = kernels.sums[keeps][smooths || more.has_all()];
  const float* weights = nullptr;
  if (keeps) {
    STD_TORCH_CHECK(dlogits->size(0) == M && dlogits->size(1) == V,
                    "dlogits: expected the shape of logits");
    STD_TORCH_CHECK(row_weights->scalar_type() == ScalarType::Float &&
                        row_weights->is_contiguous() && row_weights->numel() == M,
                    "row_weights: expected contiguous float32, one entry a row");
    weights = static_cast<const float*>(row_weights->data_ptr());
  }
  Tensor losses = torch::stable::new_empty(logits, {M}, ScalarType::Float);
  float* ce = static_cast<float*>(losses.data_ptr());
  torch::stable::parallel_for(0, M, grain(V), [&](int64_t begin, int64_t end) {
    std::vector<float> read(rows.buffer_size()), written(keeps ? grads.buffer_size() : 0);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t label = label_of[row];
      const bool has_label = label >= 0 && options.ce_weight != 0.0;
      const float* z = rows.read(row, read.data());
      const float z_label = label >= 0 ? z[label] : 0.0f;  // the gradient may lie over the row
      float* target = keeps ? grads.target(row, written.data()) : nullptr;
      const CeSums sums = sums_of(z, V, target);
      const double log_d = std::log(sums.d), mean_x = sums.x_sum / static_cast<double>(V);
      double loss = 0.0;
      if (has_label) {
        loss = log_d - (static_cast<double>(z_label) - sums.max);
        // (1 - smoothing) nll + smoothing (log_d - mean_x)
        if (smooths) loss += options.label_smoothing * ((log_d - mean_x) - loss);
      }
      ce[row] = static_cast<float>(loss);
      more.put(row, sums.max, log_d, log_d - sums.e_x_sum / sums.d, label >= 0, z_label);
      if (!keeps) continue;
      if (weights[row] == 0.0f) {
        std::fill_n(target, V, 0.0f);  // an ignored row may hold anything, NaN included
      } else {
        const double weight = weights[row],
                     ce_weight = has_label ? weight * options.ce_weight : 0.0;
        const double of_q = ce_weight + 2.0 * weight * options.z_loss_weight * (sums.max + log_d);
        const double shift = ce_weight * options.label_smoothing / static_cast<double>(V);
        kernels.scale(target, V, static_cast<float>(of_q / sums.d), static_cast<float>(shift));
        if (has_label) {
          target[label] -= static_cast<float>(ce_weight * (1.0 - options.label_smoothing));
        }
        rows.unbend(z, target);
      }
      grads.commit(row, target);
    }
  });
  return losses;
}

}  // namespace

Tensor cross_entropy_fwd(Tensor logits, std::optional<Tensor> labels, double ce_weight,
                         double label_smoothing, double z_loss_weight, std::vector<double> bends,
                         Biases biases, std::optional<Tensor> extras) {
  return run(logits, labels, std::nullopt, {ce_weight, label_smoothing, z_loss_weight}, bends,
             biases, std::nullopt, extras);
}

Tensor cross_entropy_fwd_bwd(Tensor logits, std::optional<Tensor> labels, Tensor row_weights,
                             double ce_weight, double label_smoothing, double z_loss_weight,
                             std::vector<double> bends, Biases biases, Tensor dlogits,
                             std::optional<Tensor> extras) {
  return run(logits, labels, row_weights, {ce_weight, label_smoothing, z_loss_weight}, bends,
             biases, dlogits, extras);
}

}  // namespace modxfer
