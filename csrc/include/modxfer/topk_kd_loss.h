// KD loss of one row of logits against a teacher that lists a few classes. Torch-free.
#pragma once

#include <cstdint>

namespace modxfer {

// What becomes of the classes that are not listed; in the order of kernels/kd_loss/topk.py.
enum class TopKTail : int64_t { kBucket, kRenormalise, kNone, kCount };

// Below this mass, a teacher's tail that has no class of the student's beside it is rounding:
// log(1e-4), of kernels/kd_loss/topk.py.
constexpr float kLogRounding = -9.2103404f;

// `count` different classes in [0, V), their log-probabilities, and that of all others.
struct TopKRow {
  const int64_t* ids;
  const float* log_p;
  int64_t count;
  float log_tail;
  TopKTail tail;
  float missing;  // q dD/dq is u and this times q
};

// What the gradient of a row needs beside the scratch.
struct TopKStats {
  float max;        // of the whole row
  float logd_1;     // log sum exp(z - max), computed when there is a term of temperature 1
  float u_sum;      // sum of q dD/dq
  float share;      // q of a class that is not listed, over its e^x
  float of_others;  // its temperature dD/dz, over its e^x
};

// Between forward and gradient of a row. e, u: V floats, e^x and u of the classes that are not
// listed, 0 at those that are; u of "renormalise" alone. The others: K + 1 floats, of the list and
// its tail.
struct TopKScratch {
  float *e, *u;
  float *z, *p, *q, *d, *log_p, *log_q, *u_list;
};

}  // namespace modxfer
