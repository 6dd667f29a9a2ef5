// The KD loss of rows of logits against a teacher that lists a few classes, a cluster of blocks a
// row; formulas in kernels/kd_loss/topk.py. Torch-free.
//
//   load     as of kd_loss_rows.cuh, of the student alone
//   stats    maximum and sums of e^x of the classes that are not listed, "the others", as tiles
//            come, and of the list                                          one exchange
//   sums     of f and u over the list; of "renormalise" over the others     one exchange
//   write    dlogits of the others; a tile that is done makes room for the next row's; those of the
//            list
//
// Each logit is read from memory once, or in each step where a row is not held. A block has a bit
// for each of its classes that says whether it is listed, and the logits of those of the list that
// are its own. The others' e^x are relative to their own maximum: their share of the row is as
// exact where a student gives them next to nothing.
#pragma once

#include "kd_loss_steps.cuh"
#include "softmax.cuh"

namespace modxfer::cuda {

// Rows against teachers [rows, count].
struct TopKRows {
  KdRows of;        // whose teacher is not read; extras are [rows, 1]
  const void* ids;  // what lies outside [0, classes) is absent
  bool are_wide;    // int64, or int32
  const float* log_p;
  const float* log_tail;  // [rows], of a bucket
  int count;
  TopKTail tail;
  float missing;  // q dD/dq is u and this times q
};

// Of a list: f and u, or those of a divergence that is a function of sums.
constexpr int kListSums = sizeof(OfRowPart) / sizeof(float);

struct alignas(16) TopKRoom {
  SoftmaxRoom<2> softmax;
  float warps[kMaxWarps * kListSums], sums[kMaxBlocks * kListSums];
};

// Of a class in the list of a row that a block has: its logit.
constexpr int kTopKListBytes = sizeof(float);

// The bytes of shared memory that a block needs.
inline int topk_shared_bytes(int classes, int count, int blocks, Kind logits, bool is_resident) {
  const int words = (slice_size(classes, blocks) + 31) / 32;
  return static_cast<int>(sizeof(TopKRoom)) + 4 * words + kTopKListBytes * count +
         (is_resident ? slices_bytes(1, classes, blocks, logits) : 0);
}

// Those of a row's listed classes that a block has.
class Listed {
 public:
  MODXFER_DEVICE Listed(const TopKRows& rows, int begin, int size, unsigned char* memory)
      : rows_(rows), begin_(begin), size_(size), bits_(reinterpret_cast<uint32_t*>(memory)) {
    const int words = (slice_size(rows.of.classes, device::cluster_size()) + 31) / 32;
    z_ = reinterpret_cast<float*>(bits_ + words);
    for (int i = device::thread_index(); i < words; i += device::block_size()) bits_[i] = 0;
    device::sync_block();
  }

  // Calls body(k, i) for class i of the block, which is number k of the list; each is always the
  // same thread's.
  template <class Body>
  MODXFER_DEVICE void for_each(int row, const Body& body) const {
    const int64_t first = static_cast<int64_t>(row) * rows_.count;
    for (int k = device::thread_index(); k < rows_.count; k += device::block_size()) {
      const int64_t id = rows_.are_wide ? static_cast<const int64_t*>(rows_.ids)[first + k]
                                        : static_cast<const int32_t*>(rows_.ids)[first + k];
      if (begin_ <= id && id < begin_ + size_) body(k, static_cast<int>(id) - begin_);
    }
  }

  // Sums of different bits are their union, and threads may mark and unmark at the same time.
  MODXFER_DEVICE void mark(int row) const {
    for_each(row, [&](int, int i) { device::atomic_add(bits_ + i / 32, 1u << i % 32); });
  }
  MODXFER_DEVICE void unmark(int row) const {
    for_each(row, [&](int, int i) { device::atomic_add(bits_ + i / 32, 0u - (1u << i % 32)); });
  }

  // Of four classes from i on, a multiple of 4.
  MODXFER_DEVICE uint32_t mask(int i) const { return bits_[i / 32] >> i % 32 & 0xF; }

  MODXFER_DEVICE float& z(int k) const { return z_[k]; }
  MODXFER_DEVICE float log_p(int row, int k) const {
    return rows_.log_p[static_cast<int64_t>(row) * rows_.count + k];
  }

 private:
  const TopKRows& rows_;
  int begin_, size_;
  uint32_t* bits_;
  float* z_;
};

MODXFER_DEVICE Class class_of(float log_p, float log_q) {
  return {device::exp2_approx(log_q * kLog2E), device::exp2_approx(log_p * kLog2E), log_p - log_q,
          log_q, log_p};
}

// The sums of a divergence that is a function of them. for_each(add) calls add(x) for the classes x
// that the thread has; `tail` is the class that all have.
template <Divergence kDivergence, class ForEach>
MODXFER_DEVICE KdRowSums<float> sums_of_list(const KdSpec& spec, TopKRoom& room, const Class& tail,
                                             const ForEach& for_each) {
  const auto add_to = [&](OfRowPart& part, const Class& x) {
    if constexpr (kDivergence != Divergence::kLkHybrid) {
      part.template raise<kDivergence>(log_addend<kDivergence>(x, spec));
    }
    add_of_row<kDivergence, true>(x, part.top, spec, part.sums);
  };
  OfRowPart part = {kNoTop};
  for_each([&](const Class& x) { add_to(part, x); });
  float top[1] = {part.top};
  reduce_block<true, 1>(top, room.warps);
  part.template raise<kDivergence>(top[0]);
  reduce_block<false, kListSums - 1>(&part.top + 1, room.warps);
  exchange<kListSums>(&part.top, room.sums);
  OfRowPart whole = {kNoTop};
  for (int rank = 0; rank < device::cluster_size(); ++rank) {
    OfRowPart other = *reinterpret_cast<const OfRowPart*>(room.sums + rank * kListSums);
    whole.template raise<kDivergence>(other.top);
    other.template raise<kDivergence>(whole.top);
    float* to = &whole.top;
    const float* from = &other.top;
    MODXFER_UNROLL
    for (int i = 1; i < kListSums; ++i) to[i] += from[i];
  }
  add_to(whole, tail);
  const OfRowTerms& of = whole.sums;
  KdRowSums<float> sums = {of.s, of.first, of.second, of.variation, of.signed_sum};
  take_logarithms<kDivergence>(whole.top, sums);
  return sums;
}

template <Divergence kDivergence, bool kIsResident>
MODXFER_KERNEL void topk_kd_loss_rows(MODXFER_ARGUMENT TopKRows teacher) {
  constexpr bool kIsForwardKl = kDivergence == Divergence::kForwardKl;
  const KdRows& rows = teacher.of;
  KdSpec spec = rows.spec;
  unsigned char* memory = device::shared_memory();
  auto& room = *reinterpret_cast<TopKRoom*>(memory);
  const Side student[] = {{rows.student, rows.student_stride, rows.logits, rows.student_bend}};
  Sides<1, kIsResident> sides(student, rows.classes, memory += sizeof(room));
  if (kIsResident) {
    memory += slices_bytes(1, rows.classes, device::cluster_size(), rows.logits);
  }
  const Listed listed(teacher, sides.begin(), sides.size(), memory);
  const Target target(rows.dlogits, rows.dlogits_stride, rows.kind);
  const bool has_bucket = teacher.tail == TopKTail::kBucket;
  // of classes without p, which the forward KL leaves alone
  const bool has_u =
      !kIsForwardKl && !is_of_row(kDivergence) && teacher.tail == TopKTail::kRenormalise;
  sides.start(rows.rows);
  int turn = 0;
  for (int row = device::cluster_index(); row < rows.rows; row += device::num_clusters(), ++turn) {
    const int label = label_of(rows, row);
    soften(rows, row, spec);
    const float inv_t = spec.inv_temperature, rate = inv_t * kLog2E;
    const bool has_ce = label >= 0 && spec.ce_weight != 0.0f;
    const bool has_z = spec.z_loss_weight != 0.0f, smooths = spec.label_smoothing != 0.0f;
    const bool needs_d_1 = (has_ce || has_z || rows.extras != nullptr) && inv_t != 1.0f;
    listed.mark(row);
    device::sync_block();

    // --- stats
    Softmax parts[2];
    Softmax &others = parts[0], &list = parts[1];
    for (int tile = 0; tile < sides.num_tiles(); ++tile) {
      sides.wait(tile, turn);
      sides.for_each_four(tile, [&](int i, int n) {
        Four z[1];
        sides.read(row, i, n, false, z);
        others.add(*z, ((1u << n) - 1) & ~listed.mask(i), rate, needs_d_1, smooths);
        pick(*z, label - sides.begin() - i, others.z_label);
      });
    }
    device::sync_block();  // threads read what others brought
    listed.for_each(row, [&](int k, int i) {
      Four z[1];
      sides.read(row, i, 1, true, z);
      list.add(*z, 1, rate, needs_d_1, smooths);
      listed.z(k) = z->of[0];
    });
    reduce_row(parts, rate, turn, room.softmax);
    Softmax whole = others;
    whole.add(list, rate);
    const float logd = device::log(whole.d), inv_d = 1.0f / whole.d;
    const float logd_1 = needs_d_1 ? device::log(whole.d_1) : logd;
    const float below = others.top - whole.top;
    // q of the others is e^x times this
    const float share = device::exp2_approx(below * rate) * inv_d;

    // --- sums
    const auto class_at = [&](int k) {
      const float log_q = (listed.z(k) - whole.top) * inv_t - logd;
      return class_of(listed.log_p(row, k), log_q);
    };
    const auto of_other = [&](float z) {
      if constexpr (is_of_row(kDivergence)) {
        return Terms{};  // whose others are in a bucket
      } else {
        const float q = device::exp2_approx((z - others.top) * rate) * share;
        const float log_q = q == 0.0f ? -kInf : (z - whole.top) * inv_t - logd;
        return terms_of<kDivergence>(Class{q, 0.0f, -kInf, log_q, -kInf}, rows);
      }
    };
    Class tail = class_of(-kInf, -kInf);
    if (has_bucket) {
      // nothing of the student's is left, and of the teacher's no more than rounding
      const float log_p = teacher.log_tail[row];
      const bool is_full = list.count == static_cast<float>(rows.classes);
      const bool is_gone = others.d == 0.0f && (is_full || log_p < kLogRounding);
      tail = class_of(is_gone ? -kInf : log_p, below * inv_t + (device::log(others.d) - logd));
    }
    float sums[2] = {};  // of f and u
    KdOfRow of_row;
    if constexpr (is_of_row(kDivergence)) {
      const auto for_each = [&](const auto& add) {
        listed.for_each(row, [&](int k, int) { add(class_at(k)); });
      };
      const auto found = sums_of_list<kDivergence>(rows.spec, room, tail, for_each);
      const KdSums<float> of = of_sums<kDivergence>(found, rows.spec, of_row);
      sums[0] = of.kd;
      sums[1] = of.u;
    } else {
      const auto add = [&](const Terms& terms, float missing) {
        sums[0] += terms.f;
        sums[1] += terms.u + missing;
      };
      listed.for_each(row, [&](int k, int) {
        const Class x = class_at(k);
        add(terms_of<kDivergence>(x, rows), teacher.missing * x.q);
      });
      if (has_u) {
        for (int tile = 0; tile < sides.num_tiles(); ++tile) {
          sides.for_each_four(tile, [&](int i, int n) {
            Four z[1];
            sides.read(row, i, n, true, z);
            const uint32_t mask = ((1u << n) - 1) & ~listed.mask(i);
            MODXFER_UNROLL
            for (int k = 0; k < 4; ++k) {
              if (mask >> k & 1) add(of_other(z->of[k]), 0.0f);
            }
          });
        }
      }
      reduce_block<false, 2>(sums, room.warps);
      exchange<2>(sums, room.sums);
      sums[0] = sums[1] = 0.0f;
      for (int rank = 0; rank < device::cluster_size(); ++rank) {
        sums[0] += room.sums[2 * rank];
        sums[1] += room.sums[2 * rank + 1];
      }
      if (has_bucket) add(terms_of<kDivergence>(tail, rows), 0.0f);
    }
    const auto u_of_class = [&](const Class& x) {
      if constexpr (is_of_row(kDivergence)) {
        return of_row_u<kDivergence>(x, of_row, rows.spec);
      } else {
        return terms_of<kDivergence>(x, rows).u + teacher.missing * x.q;
      }
    };
    const float u_sum = kIsForwardKl && teacher.tail != TopKTail::kNone ? -1.0f : sums[1];
    float of_others = -u_sum * share;  // temperature dD/dz of the others, over their e^x
    if (has_bucket && others.d != 0.0f) of_others += u_of_class(tail) / others.d;

    if (device::thread_index() == 0 && device::cluster_rank() == 0) {
      rows.kd[row] = sums[0];
      float ce = has_ce ? logd_1 - (whole.z_label - whole.top) : 0.0f;
      if (has_ce && smooths)
        ce += spec.label_smoothing * ((logd_1 - whole.x_sum / whole.count) - ce);
      rows.ce[row] = ce;
      if (rows.extras != nullptr) rows.extras[row] = whole.top + logd_1;
    }

    // --- write
    const float weight = rows.dlogits == nullptr ? 0.0f : rows.row_weights[row];
    const float kd_scale = weight * spec.kd_weight * inv_t;
    const float ce_scale = has_ce ? weight * spec.ce_weight : 0.0f;
    float q1_scale = ce_scale;
    if (has_z) q1_scale += 2.0f * weight * spec.z_loss_weight * (whole.top + logd_1);
    const float shift = ce_scale * spec.label_smoothing / spec.classes;
    const float of_label = ce_scale * (1.0f - spec.label_smoothing);
    // of_q: of the softmax at temperature 1, from that of the temperature where they are one
    const auto with_hard = [&](int i, float z, float dz, float q) {
      const float x = z - whole.top;
      if (needs_d_1 && q1_scale != 0.0f) q = device::exp2_approx((x - logd_1) * kLog2E);
      if (q1_scale != 0.0f) dz += q1_scale * q;
      return (i == label ? dz - of_label : dz) - shift;
    };
    write_row(sides, row, rows, target, weight, [&](int i, float z) {
      const float e = device::exp2_approx((z - others.top) * rate);
      float dz = e * of_others;
      if (has_u) dz += of_other(z).u;
      return with_hard(i, z, kd_scale * dz, e * share);
    });
    device::sync_block();  // behind what stands there until now, and the last reading of the bits
    if (weight != 0.0f) {
      listed.for_each(row, [&](int k, int i) {
        const float z = listed.z(k);
        const Class x = class_at(k);
        const int at = sides.begin() + i;
        const float dz = kd_scale * (u_of_class(x) - x.q * u_sum);
        Four dlogits = {{with_hard(at, z, dz, x.q)}};
        if (!rows.student_bend.is_straight()) dlogits.of[0] *= bend_slope(z, rows.student_bend);
        target.put(row, at, 1, dlogits);
      });
    }
    listed.unmark(row);
  }
}

}  // namespace modxfer::cuda
