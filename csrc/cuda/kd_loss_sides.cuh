// The two rows of logits that a cluster compares, each block's slice of them in its shared memory.
// Included by kd_loss_rows.cuh.

struct alignas(16) Four {
  float of[4];
};

struct alignas(8) FourHalves {
  uint16_t of[4];
};

// The logits of a row on one side, of a dtype that is known at run time.
struct Side {
  const void* rows;
  int64_t stride;
  Kind kind;
  Bend bend;
  unsigned char* own;  // a block's slice of one row, in shared memory

  MODXFER_DEVICE const unsigned char* at(int row, int i) const {
    return static_cast<const unsigned char*>(rows) + (row * stride + i) * size_of(kind);
  }
};

// Four values from an address, the first n of them where there are fewer; those past are -inf,
// classes without probability.
MODXFER_DEVICE void read_four(const unsigned char* from, Kind kind, bool is_aligned, int n,
                              Four& z) {
  if (kind == Kind::kFloat && is_aligned && n == 4) {
    z = *reinterpret_cast<const Four*>(from);
    return;
  }
  FourHalves bits = {};
  const bool is_wide = kind == Kind::kFloat;
  if (!is_wide && is_aligned && n == 4) bits = *reinterpret_cast<const FourHalves*>(from);
  MODXFER_UNROLL
  for (int k = 0; k < 4; ++k) {
    z.of[k] = -kInf;
    if (k >= n) continue;
    if (is_wide) {
      z.of[k] = reinterpret_cast<const float*>(from)[k];
    } else {
      if (!is_aligned || n < 4) bits.of[k] = reinterpret_cast<const uint16_t*>(from)[k];
      z.of[k] = device::from_bits(bits.of[k], kind == Kind::kBf16);
    }
  }
}

// A block's classes of both rows: raw logits in shared memory, once each is read, or where they
// lie.
template <bool kIsResident>
class Sides {
 public:
  MODXFER_DEVICE Sides(const KdRows& rows, unsigned char* memory) {
    const int size = slice_size(rows.classes, device::cluster_size());
    begin_ = device::cluster_rank() * size;
    size_ = rows.classes - begin_ < size ? rows.classes - begin_ : size;
    if (size_ < 0) size_ = 0;
    const int bytes = kIsResident ? size * size_of(rows.logits) : 0;
    student_ = {rows.student, rows.student_stride, rows.logits, rows.student_bend, memory};
    teacher_ = {rows.teacher, rows.teacher_stride, rows.logits, rows.teacher_bend, memory + bytes};
    full_ = reinterpret_cast<device::Barrier*>(memory + 2 * bytes);
    const int64_t pitches = (rows.student_stride | rows.teacher_stride) * size_of(rows.logits);
    const auto bits = reinterpret_cast<uintptr_t>(rows.student) |
                      reinterpret_cast<uintptr_t>(rows.teacher) | static_cast<uintptr_t>(pitches);
    is_aligned_ = bits % 16 == 0;
  }

  MODXFER_DEVICE int begin() const { return begin_; }
  MODXFER_DEVICE int num_tiles() const { return (size_ + kTile - 1) / kTile; }

  MODXFER_DEVICE void init() {
    if constexpr (kIsResident) {
      if (device::thread_index() == 0) {
        for (int tile = 0; tile < num_tiles(); ++tile) full_[tile].init(1);
        device::fence_barriers();
      }
      device::sync_block();
    }
  }

  // Starts the copies of a tile of a row. By one thread.
  MODXFER_DEVICE void load(int row, int tile) {
    if constexpr (kIsResident) {
      const int bytes = num_copied(tile) * size_of(student_.kind);
      if (bytes == 0) return;
      full_[tile].arrive_expecting(2 * bytes);
      const int i = tile * kTile;
      device::copy_bulk(own(student_, i), student_.at(row, begin_ + i), bytes, full_[tile]);
      device::copy_bulk(own(teacher_, i), teacher_.at(row, begin_ + i), bytes, full_[tile]);
    }
  }

  // Until a tile of the block's row number `turn` has come.
  MODXFER_DEVICE void wait(int tile, int turn) {
    if constexpr (kIsResident) {
      if (num_copied(tile) > 0) full_[tile].wait(turn & 1);
    }
  }

  // Calls body(i, n) for the n <= 4 classes from i on that this thread has of a tile: the same of
  // each pass over a row. All threads take a step together, also those that have none, n <= 0.
  template <class Body>
  MODXFER_DEVICE void for_each_step(int tile, const Body& body) const {
    const int end = tile * kTile + count_of(tile);
    for (int step = tile * kTile; step < end; step += 4 * device::block_size()) {
      const int i = step + 4 * device::thread_index();
      body(i, end - i < 4 ? end - i : 4);
    }
  }

  template <class Body>
  MODXFER_DEVICE void for_each_four(int tile, const Body& body) const {
    for_each_step(tile, [&](int i, int n) {
      if (n > 0) body(i, n);
    });
  }

  // The logits as the loss sees them; `again` after the thread's first reading of this row.
  MODXFER_DEVICE void read(int row, int i, int n, bool again, Four& z_s, Four& z_t) const {
    read_side(student_, row, i, n, again, z_s);
    read_side(teacher_, row, i, n, again, z_t);
  }

 private:
  MODXFER_DEVICE int count_of(int tile) const {
    const int left = size_ - tile * kTile;
    return left < kTile ? left : kTile;
  }
  // Of a tile, those that a bulk copy brings: 16 bytes at least, whatever the dtype.
  MODXFER_DEVICE int num_copied(int tile) const { return is_aligned_ ? count_of(tile) / 8 * 8 : 0; }
  MODXFER_DEVICE static unsigned char* own(const Side& side, int i) {
    return side.own + i * size_of(side.kind);
  }

  MODXFER_DEVICE void read_side(const Side& side, int row, int i, int n, bool again,
                                Four& z) const {
    const bool has_come = again || i % kTile + n <= num_copied(i / kTile);
    if (kIsResident && has_come) {
      read_four(own(side, i), side.kind, true, n, z);
    } else {
      const unsigned char* from = side.at(row, begin_ + i);
      read_four(from, side.kind, is_aligned_, n, z);
      if (kIsResident) keep(side, from, i, n);
    }
    if (side.bend.is_identity()) return;
    MODXFER_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k < n) z.of[k] = bent(z.of[k], side.bend);
    }
  }

  MODXFER_DEVICE static void keep(const Side& side, const unsigned char* from, int i, int n) {
    MODXFER_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k >= n) break;
      if (side.kind == Kind::kFloat) {
        reinterpret_cast<float*>(own(side, i))[k] = reinterpret_cast<const float*>(from)[k];
      } else {
        reinterpret_cast<uint16_t*>(own(side, i))[k] = reinterpret_cast<const uint16_t*>(from)[k];
      }
    }
  }

  Side student_, teacher_;
  device::Barrier* full_;
  int begin_, size_;
  bool is_aligned_;
};
