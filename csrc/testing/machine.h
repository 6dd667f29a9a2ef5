// The threads of a cluster, what they wait for, and what each of them knows of the others.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace modxfer::emulator {

// How far each thread has come, as far as another one knows. Copies count as threads: each takes
// one of kCopies places behind those of the cluster, with a clock that tells it from the last.
using Clocks = std::vector<uint32_t>;
using Seen = std::shared_ptr<const Clocks>;
constexpr int kCopies = 64;

struct Thread {
  int index, block, rank;
  unsigned char* shared;
  Context context;
  Seen seen;
  uint32_t clock = 1;         // its own: one more whenever others learn what it did
  Site site{"its start", 0};  // where it waits, or last met others
  const char* waits_for = nullptr;
  bool is_done = false;
  uint64_t cluster_generation = 0;  // of which it has arrived
  int group = 0;                    // of asynchronous copies, that is open
  uint64_t lanes[kWarp] = {};       // what the lanes of its warp exchanged
};

// Threads that meet, again and again: a warp, a block, or a cluster.
struct Meeting {
  int size;
  Site first{};  // where the first of this generation arrived
  std::vector<int> arrived, waiting;
  uint64_t generation = 0;
  Seen released;
  uint64_t lanes[kWarp] = {};
};

// A barrier in shared memory.
struct Phases {
  int arrivals, missing;
  int64_t bytes = 0;  // expected, less those that came
  int phase = 0;
  Seen coming, released;
  std::vector<int> waiting;
  int made_by = 0;
  uint32_t made_at = 0;  // its clock
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  uint64_t* barrier;  // that is told, or nullptr: it belongs to a group of its thread
  int thread, group;
  int place;  // among the clocks
  uint32_t clock;
  Seen seen;  // by the thread that started it
  Site site;
  bool has_landed = false;
};

class Machine {
 public:
  Machine(const Grid& grid, const std::function<void()>& kernel);
  ~Machine();
  void run();

  Thread& thread() { return threads_[current_]; }
  void meet_block(Site site);
  void meet_cluster(Site site, bool arrives, bool waits);
  const uint64_t* meet_warp(uint64_t value, Site site, bool orders);
  void* of_rank(void* shared, int rank, Site site);
  void init(uint64_t* barrier, int arrivals, Site site);
  void arrive(uint64_t* barrier, int64_t bytes, Site site);
  void wait(uint64_t* barrier, int parity, Site site);
  void start(Copy copy);
  void wait_groups(int groups_left, Site site);
  [[noreturn]] void fail(const std::string& what);

  // --- for the checker
  int current() const { return current_; }
  int cluster() const { return cluster_; }
  bool knows(int thread, uint32_t clock) const;
  bool block_knows(int rank, int thread, uint32_t clock) const;
  bool has_ended(int rank) const { return ended_[rank] == grid_.threads; }
  const Grid& grid() const { return grid_; }
  std::string name_of(int thread) const;
  // Of all blocks, with gaps between them; is_ours: so many bytes lie in one of them.
  unsigned char* arena() const { return arena_; }
  size_t stride() const { return stride_; }
  size_t arena_bytes() const { return stride_ * grid_.cluster; }
  bool is_ours(const void* shared, int64_t bytes) const;
  bool owns_stack(const void* at) const {
    const Stack& stack = stacks_[current_];
    return at >= stack.bottom() && at < stack.bottom() + stack.size();
  }

 private:
  static void entry();
  void end_thread();
  void run_cluster();
  void go_on(bool ends = false);
  void suspend(std::vector<int>& waiting, const char* waits_for);
  void wake(std::vector<int>& waiting);
  void add(Meeting& meeting, Site site, const char* what, bool orders);
  void land(Copy& copy);
  bool land_any();
  void end_phase_if_complete(Phases& phases);
  Phases& phases_of(uint64_t* barrier);
  Seen release();  // what this thread knows and did, and its clock goes on
  int num_clocks() const { return grid_.cluster * grid_.threads + kCopies; }
  std::string who_waits() const;

  const Grid grid_;
  const std::function<void()>& kernel_;
  const Schedule schedule_;
  std::mt19937_64 random_;
  Context main_;
  std::vector<Stack> stacks_;
  std::vector<Thread> threads_;
  std::deque<int> ready_;
  std::vector<Meeting> warps_, blocks_;
  Meeting whole_{};
  std::unordered_map<uint64_t*, Phases> barriers_;
  std::deque<Copy> copies_;  // that have not landed, or that their thread has not waited for
  Clocks copy_clocks_;
  std::vector<int> ended_;  // threads of each block
  unsigned char* arena_;
  size_t stride_;
  int current_ = 0, cluster_ = 0, done_ = 0, next_copy_ = 0;
  std::string fault_;
};

Machine* machine();  // that runs, or nullptr

// Both, and neither is changed.
Seen joined(const Seen& a, const Seen& b);

// What checker.cpp adds, where it is linked.
class Checker {
 public:
  virtual ~Checker() = default;
  virtual void begin_launch() = 0;
  virtual void begin_cluster(Machine& machine) = 0;
  virtual void copied(Machine& machine, const Copy& copy) = 0;
  // All threads of a block have.
  virtual void ended(Machine& machine, int rank) = 0;
  virtual void set_atomic(bool is_atomic) = 0;
};
Checker*& checker();

}  // namespace modxfer::emulator
