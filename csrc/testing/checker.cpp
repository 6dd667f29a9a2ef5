// Answers the calls that -fsanitize=thread puts before each access of a kernel, in the place of its
// library: every byte remembers who wrote and who read it, and what is not ordered is a fault.
#include <cstdint>
#include <cstdio>
#include <unordered_map>
#include <utility>
#include <vector>

#include "machine.h"

namespace modxfer::emulator {
namespace {

struct Access {
  int cluster = -1;  // -1: none
  int thread = 0;
  uint32_t clock = 0;
  bool is_atomic = false;
};

struct Cell {
  Access write;
  // Since the write: those that are not ordered before one another, or of many their clocks by
  // thread, all of one cluster.
  std::vector<Access> reads;
  Clocks many;
  bool is_written = false;
};
constexpr size_t kFew = 8;

constexpr uintptr_t kLine = 64;
struct Line {
  Cell cells[kLine];
};

class Shadow : public Checker {
 public:
  Shadow() { checker() = this; }

  void begin_launch() override { global_.clear(); }
  void begin_cluster(Machine& machine) override {
    shared_.assign(machine.arena_bytes(), {});
    is_atomic_ = false;
  }
  // What other blocks do with the memory of this one has to be over.
  void ended(Machine& machine, int rank) override {
    const auto is_foreign = [&](const Access& access) {
      return access.cluster >= 0 && access.thread / machine.grid().threads != rank &&
             !machine.block_knows(rank, access.thread, access.clock);
    };
    const size_t first = rank * machine.stride();
    for (size_t i = first; i < first + machine.grid().shared_bytes; ++i) {
      const Cell& cell = shared_[i];
      bool is_used = is_foreign(cell.write);
      for (const Access& read : cell.reads) is_used = is_used || is_foreign(read);
      for (size_t t = 0; t < cell.many.size(); ++t) {
        const Access read{machine.cluster(), static_cast<int>(t), cell.many[t], false};
        is_used = is_used || (read.clock > 0 && is_foreign(read));
      }
      if (is_used) machine.fail("ends its block while another one uses its shared memory");
    }
  }
  void set_atomic(bool is_atomic) override { is_atomic_ = is_atomic; }

  // Of the thread that runs.
  void access(const void* at, int bytes, bool writes) {
    Machine* machine = emulator::machine();
    if (machine == nullptr || machine->owns_stack(at)) return;
    Thread& thread = machine->thread();
    touch(*machine, at, bytes, writes,
          {machine->cluster(), machine->current(), thread.clock, is_atomic_}, *thread.seen);
  }

  // A copy reads and writes as a thread that knows what its starter knew.
  void copied(Machine& machine, const Copy& copy) override {
    const Access own{machine.cluster(), copy.place, copy.clock, false};
    touch(machine, copy.from, copy.bytes, false, own, *copy.seen);
    touch(machine, copy.to, copy.bytes, true, own, *copy.seen);
  }

 private:
  void touch(Machine& machine, const void* at, int bytes, bool writes, const Access& own,
             const Clocks& seen) {
    const auto address = reinterpret_cast<uintptr_t>(at);
    const auto arena = reinterpret_cast<uintptr_t>(machine.arena());
    const bool is_shared = address >= arena && address < arena + machine.arena_bytes();
    if (is_shared && !machine.is_ours(at, bytes)) machine.fail("reaches beyond its shared memory");
    if (is_shared && machine.has_ended(static_cast<int>((address - arena) / machine.stride()))) {
      machine.fail("uses the shared memory of a block that has ended");
    }
    for (uintptr_t i = address; i < address + bytes; ++i) {
      Cell& cell = is_shared ? shared_[i - arena] : global_[i / kLine].cells[i % kLine];
      if (is_shared && !writes && !cell.is_written) {
        machine.fail("reads shared memory that nobody wrote, byte " +
                     std::to_string((i - arena) % machine.stride()));
      }
      check(machine, cell.write, own, seen,
            writes ? "writes what was written by " : "reads what was written by ");
      if (writes) {
        for (const Access& read : cell.reads) check(machine, read, own, seen, kOverRead);
        for (size_t t = 0; t < cell.many.size(); ++t) {
          if (cell.many[t] == 0) continue;
          check(machine, {own.cluster, static_cast<int>(t), cell.many[t], false}, own, seen,
                kOverRead);
        }
        cell.reads.clear();
        cell.many.clear();
        cell.write = own;
        cell.is_written = true;
      } else {
        note(cell, own, seen);
      }
    }
  }

  static constexpr const char* kOverRead = "writes what was read by ";

  static bool is_ordered(const Access& before, const Access& own, const Clocks& seen) {
    if (before.cluster < 0 || (before.is_atomic && own.is_atomic)) return true;
    if (before.cluster != own.cluster) return false;
    return before.thread == own.thread ? before.clock <= own.clock
                                       : seen[before.thread] >= before.clock;
  }

  static void check(Machine& machine, const Access& before, const Access& own, const Clocks& seen,
                    const char* what) {
    if (is_ordered(before, own, seen)) return;
    const std::string who =
        before.cluster == own.cluster ? machine.name_of(before.thread) : "another cluster";
    machine.fail(what + who + ", and nothing orders the two");
  }

  static void note(Cell& cell, const Access& own, const Clocks& seen) {
    if (!cell.many.empty() && cell.reads.front().cluster == own.cluster) {
      cell.many[own.thread] = own.clock;
      return;
    }
    size_t kept = 0;
    for (const Access& read : cell.reads) {
      if (!is_ordered(read, own, seen)) cell.reads[kept++] = read;
    }
    cell.reads.resize(kept);
    cell.reads.push_back(own);
    if (cell.reads.size() <= kFew) return;
    // one stays, and tells the cluster
    cell.many.assign(seen.size(), 0);
    for (const Access& read : cell.reads) {
      if (read.cluster == own.cluster) cell.many[read.thread] = read.clock;
    }
    cell.reads = {own};
  }

  std::vector<Cell> shared_;
  std::unordered_map<uintptr_t, Line> global_;
  bool is_atomic_ = false;
};

Shadow& shadow() {
  static Shadow* shadow = new Shadow;  // accesses come as long as the process lives
  return *shadow;
}

[[maybe_unused]] const bool is_linked = (shadow(), true);

}  // namespace
}  // namespace modxfer::emulator

using modxfer::emulator::shadow;

#define MODXFER_ACCESS(size)                                                       \
  void __tsan_read##size(void* at) { shadow().access(at, size, false); }           \
  void __tsan_write##size(void* at) { shadow().access(at, size, true); }           \
  void __tsan_unaligned_read##size(void* at) { shadow().access(at, size, false); } \
  void __tsan_unaligned_write##size(void* at) { shadow().access(at, size, true); }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* at, unsigned long bytes) {
  shadow().access(at, static_cast<int>(bytes), false);
}
void __tsan_write_range(void* at, unsigned long bytes) {
  shadow().access(at, static_cast<int>(bytes), true);
}
MODXFER_ACCESS(1)
MODXFER_ACCESS(2)
MODXFER_ACCESS(4)
MODXFER_ACCESS(8)
MODXFER_ACCESS(16)
}
