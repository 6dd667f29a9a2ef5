// The row kernels of the KD loss in stages, of a row whose classes several ranks share. Torch-free.
#pragma once

#include <cstdint>

namespace modxfer {

// What a rank says of its classes of a row, relative to their own maxima; the order of the columns
// of kernels/kd_loss/stages.py, which puts those of all ranks together. The last three where asked
// for.
struct KdPart {
  double max_s;
  double d_s;  // sum exp((z_s - max_s) / temperature)
  double max_t;
  double d_t;
  double d_1;            // sum exp(z_s - max_s), d_s at temperature 1
  double mean;           // KL of these classes alone, of a divergence that is one
  double mean_x;         // mean of z_s - max_s
  double z_label;        // 0 where the label is another rank's
  double mean_x_s;       // of z_s - max_s under its own softmax at the temperature
  double mean_x_t;       // the same of the teacher
  double is_top_shared;  // 1 where a class is the largest of both
};

// What a rank says of its classes where the divergence is a function of sums over the row; as
// `OfRow.sums` of kernels/divergences.py.
template <class Number>
struct KdRowSums {
  Number log_sum;  // log S of its classes
  Number first;
  Number second;
  Number variation;
  Number signed_sum;
};

// What u of a class is made of beside its p and q: the numbers of `OfRow.value`.
struct KdOfRow {
  float slope;  // 0 where S is far from 1
  float log_sum;
};

}  // namespace modxfer
