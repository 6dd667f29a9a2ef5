#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <sstream>

#include "machine.h"

namespace modxfer::emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024, kAlignment = 128, kGap = 256;
Machine* running = nullptr;

size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

bool is_aligned(const void* at, size_t to) { return reinterpret_cast<uintptr_t>(at) % to == 0; }

std::string text(Site site) {
  const std::string path = site.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

void poison([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(at, bytes);
#endif
}

void unpoison([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(at, bytes);
#endif
}

}  // namespace

Schedule Schedule::of(uint64_t seed) {
  constexpr Order kOrders[] = {Order::kFirst, Order::kLast, Order::kRandom};
  return {kOrders[seed % 3], seed, seed % 2 == 1,
          seed % 4 < 2 ? (unsigned char)0xFF : (unsigned char)0x7F};
}

Schedule& schedule() {
  static Schedule schedule;
  return schedule;
}

Checker*& checker() {
  static Checker* checker = nullptr;
  return checker;
}

Machine* machine() { return running; }

Seen joined(const Seen& a, const Seen& b) {
  if (a == nullptr || a == b) return b;
  if (b == nullptr) return a;
  auto both = std::make_shared<Clocks>(*a);
  for (size_t i = 0; i < both->size(); ++i) (*both)[i] = std::max((*both)[i], (*b)[i]);
  return both;
}

Machine::Machine(const Grid& grid, const std::function<void()>& kernel)
    : grid_(grid), kernel_(kernel), schedule_(schedule()), random_(schedule_.seed) {
  if (running != nullptr) throw Fault("a kernel launches another one");
  if (grid.cluster < 1 || grid.blocks < 1 || grid.blocks % grid.cluster != 0) {
    throw Fault("a grid of " + std::to_string(grid.blocks) + " blocks in clusters of " +
                std::to_string(grid.cluster));
  }
  if (grid.threads < kWarp || grid.threads > 1024 || grid.threads % kWarp != 0) {
    throw Fault("a block of " + std::to_string(grid.threads) + " threads");
  }
  if (grid.shared_bytes > 227 * 1024) throw Fault("more shared memory than a block can have");
  const int count = grid.cluster * grid.threads;
  while (static_cast<int>(stacks_.size()) < count) stacks_.emplace_back(kStackBytes);
  stride_ = rounded_up(grid.shared_bytes, kAlignment) + kGap;
  arena_ = static_cast<unsigned char*>(
      std::aligned_alloc(kAlignment, rounded_up(arena_bytes(), kAlignment)));
  running = this;
}

Machine::~Machine() {
  unpoison(arena_, arena_bytes());
  std::free(arena_);
  running = nullptr;
}

void Machine::run() {
  if (checker() != nullptr) checker()->begin_launch();
  for (cluster_ = 0; cluster_ < grid_.blocks / grid_.cluster; ++cluster_) run_cluster();
}

void Machine::run_cluster() {
  const int count = grid_.cluster * grid_.threads;
  unpoison(arena_, arena_bytes());
  std::fill_n(arena_, arena_bytes(), schedule_.fill);
  copy_clocks_.assign(kCopies, 0);
  copies_.clear();
  barriers_.clear();
  ready_.clear();
  warps_.assign(count / kWarp, {kWarp});
  blocks_.assign(grid_.cluster, {grid_.threads});
  whole_ = {count};
  done_ = 0;
  ended_.assign(grid_.cluster, 0);
  threads_.assign(count, {});
  const Seen nothing = std::make_shared<Clocks>(num_clocks());
  for (int i = 0; i < count; ++i) {
    const int rank = i / grid_.threads;
    unsigned char* shared = arena_ + rank * stride_;
    if (i % grid_.threads == 0) poison(shared + grid_.shared_bytes, stride_ - grid_.shared_bytes);
    unpoison(stacks_[i].bottom(), stacks_[i].size());
    threads_[i].index = i % grid_.threads;
    threads_[i].block = cluster_ * grid_.cluster + rank;
    threads_[i].rank = rank;
    threads_[i].shared = shared;
    threads_[i].context = Context(stacks_[i], &Machine::entry);
    threads_[i].seen = nothing;
    ready_.push_back(i);
  }
  if (checker() != nullptr) checker()->begin_cluster(*this);
  current_ = ready_.front();
  ready_.pop_front();
  main_.go_to(threads_[current_].context);
  if (!fault_.empty()) throw Fault(fault_);
  for (const Copy& copy : copies_) {
    if (copy.has_landed) continue;
    throw Fault("a copy of " + text(copy.site) + " lands after the block has ended");
  }
}

void Machine::entry() {
  Context::arrived();
  Machine& self = *running;
  self.kernel_();
  self.end_thread();
  self.go_on(true);
  std::abort();  // nobody goes back to a thread that has ended
}

void Machine::end_thread() {
  Thread& mine = thread();
  mine.is_done = true;
  ++done_;
  if (++ended_[mine.rank] < grid_.threads) return;
  if (checker() != nullptr) checker()->ended(*this, mine.rank);
  std::fill_n(mine.shared, grid_.shared_bytes, schedule_.fill);  // as another block may find it
}

void Machine::fail(const std::string& what) {
  fault_ = what + " (" + name_of(current_) + ")";
  Context& mine = thread().context;
  mine.go_to(main_, true);
  std::abort();
}

void Machine::go_on(bool ends) {
  Context& mine = thread().context;
  while (ready_.empty() && land_any()) {
  }
  if (ready_.empty()) {
    if (done_ < static_cast<int>(threads_.size())) fault_ = who_waits();
    mine.go_to(main_, ends || !fault_.empty());
    return;
  }
  if (schedule_.order == Schedule::Order::kRandom) {
    if (random_() % 8 == 0) land_any();
    std::swap(ready_.front(), ready_[random_() % ready_.size()]);
  }
  const bool is_last = schedule_.order == Schedule::Order::kLast;
  const int next = is_last ? ready_.back() : ready_.front();
  is_last ? ready_.pop_back() : ready_.pop_front();
  if (next == current_) return;
  current_ = next;
  mine.go_to(threads_[next].context, ends);
}

void Machine::suspend(std::vector<int>& waiting, const char* waits_for) {
  thread().waits_for = waits_for;
  waiting.push_back(current_);
  go_on();
  thread().waits_for = nullptr;
}

void Machine::wake(std::vector<int>& waiting) {
  ready_.insert(ready_.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

std::string Machine::who_waits() const {
  std::map<std::string, int> counts;
  for (const Thread& each : threads_) {
    const std::string what = each.waits_for == nullptr ? "have ended"
                                                       : std::string("wait for ") + each.waits_for +
                                                             " at " + text(each.site);
    ++counts[what];
  }
  std::ostringstream found;
  found << "nobody can go on:";
  for (const auto& [what, count] : counts) found << " " << count << " threads " << what << ";";
  return found.str();
}

std::string Machine::name_of(int thread) const {
  if (thread >= static_cast<int>(threads_.size())) return "a copy";
  const Thread& of = threads_[thread];
  return "thread " + std::to_string(of.index) + " of block " + std::to_string(of.block) +
         ", after " + text(of.site);
}

// --- meetings

Seen Machine::release() {
  Thread& mine = thread();
  auto seen = std::make_shared<Clocks>(*mine.seen);
  (*seen)[current_] = mine.clock++;
  return seen;
}

bool Machine::block_knows(int rank, int thread, uint32_t clock) const {
  for (int i = rank * grid_.threads; i < (rank + 1) * grid_.threads; ++i) {
    if (i == thread || (*threads_[i].seen)[thread] >= clock) return true;
  }
  return false;
}

bool Machine::knows(int thread, uint32_t clock) const {
  return thread == current_ || (*threads_[current_].seen)[thread] >= clock;
}

void Machine::add(Meeting& meeting, Site site, const char* what, bool orders) {
  if (meeting.arrived.empty()) meeting.first = site;
  const Site first = meeting.first;
  if (first.line != site.line || std::strcmp(first.file, site.file) != 0) {
    fail(std::string("threads of one ") + what + " meet at " + text(first) + " and at " +
         text(site));
  }
  thread().site = site;
  meeting.arrived.push_back(current_);
  if (static_cast<int>(meeting.arrived.size()) < meeting.size) return;
  if (orders) {
    auto all = std::make_shared<Clocks>(num_clocks());
    std::vector<const Clocks*> merged;  // those of one warp, or of one block, are the same
    for (int each : meeting.arrived) {
      const Clocks* seen = threads_[each].seen.get();
      if (std::find(merged.begin(), merged.end(), seen) != merged.end()) continue;
      merged.push_back(seen);
      for (size_t i = 0; i < all->size(); ++i) (*all)[i] = std::max((*all)[i], (*seen)[i]);
    }
    for (int each : meeting.arrived) (*all)[each] = threads_[each].clock++;
    meeting.released = all;
  }
  ++meeting.generation;
  meeting.arrived.clear();
  wake(meeting.waiting);
}

void Machine::meet_block(Site site) {
  Meeting& meeting = blocks_[thread().rank];
  const uint64_t generation = meeting.generation;
  add(meeting, site, "block", true);
  if (meeting.generation == generation) suspend(meeting.waiting, "their block");
  thread().seen = meeting.released;
}

void Machine::meet_cluster(Site site, bool arrives, bool waits) {
  Thread& mine = thread();
  if (arrives) {
    mine.cluster_generation = whole_.generation + 1;
    add(whole_, site, "cluster", true);
  }
  if (!waits) return;
  if (mine.cluster_generation == 0)
    fail("waits for its cluster without having arrived, at " + text(site));
  mine.site = site;
  if (whole_.generation < mine.cluster_generation) suspend(whole_.waiting, "their cluster");
  mine.seen = joined(mine.seen, whole_.released);
}

const uint64_t* Machine::meet_warp(uint64_t value, Site site, bool orders) {
  Thread& mine = thread();
  Meeting& meeting = warps_[current_ / kWarp];
  const uint64_t generation = meeting.generation;
  meeting.lanes[mine.index % kWarp] = value;
  const std::vector<int> others = meeting.arrived;
  add(meeting, site, "warp", orders);
  if (meeting.generation == generation) {
    suspend(meeting.waiting, "their warp");
  } else {
    // the next exchange may begin before all lanes have gone on
    std::copy_n(meeting.lanes, kWarp, mine.lanes);
    for (int each : others) std::copy_n(meeting.lanes, kWarp, threads_[each].lanes);
  }
  if (orders) mine.seen = joined(mine.seen, meeting.released);
  return mine.lanes;
}

// --- shared memory

bool Machine::is_ours(const void* shared, int64_t bytes) const {
  const auto* at = static_cast<const unsigned char*>(shared);
  if (at < arena_ || at >= arena_ + arena_bytes()) return false;
  return static_cast<int64_t>((at - arena_) % stride_) + bytes <= grid_.shared_bytes;
}

void* Machine::of_rank(void* shared, int rank, Site site) {
  if (rank < 0 || rank >= grid_.cluster)
    fail("asks for block " + std::to_string(rank) + " of a cluster of " +
         std::to_string(grid_.cluster) + " at " + text(site));
  const auto here = static_cast<unsigned char*>(shared) - thread().shared;
  if (here < 0 || here > grid_.shared_bytes) fail("has no such shared memory at " + text(site));
  return arena_ + rank * stride_ + here;
}

Phases& Machine::phases_of(uint64_t* barrier) {
  const auto found = barriers_.find(barrier);
  if (found == barriers_.end() || !knows(found->second.made_by, found->second.made_at)) {
    fail("uses a barrier that is not initialised, or that it cannot know to be");
  }
  return found->second;
}

void Machine::init(uint64_t* barrier, int arrivals, Site site) {
  if (!is_ours(barrier, sizeof(*barrier)) || !is_aligned(barrier, 8))
    fail("has a barrier outside of shared memory at " + text(site));
  Phases phases{arrivals, arrivals};
  phases.made_by = current_;
  phases.made_at = thread().clock;
  phases.coming = release();
  barriers_[barrier] = phases;
}

void Machine::end_phase_if_complete(Phases& phases) {
  if (phases.missing > 0 || phases.bytes != 0) return;
  phases.released = phases.coming;
  phases.missing = phases.arrivals;
  ++phases.phase;
  wake(phases.waiting);
}

void Machine::arrive(uint64_t* barrier, int64_t bytes, Site site) {
  thread().site = site;
  Phases& phases = phases_of(barrier);
  if (phases.missing == 0)
    fail("arrives at a barrier once more than it was initialised for, at " + text(site));
  phases.coming = joined(phases.coming, release());
  phases.bytes += bytes;
  --phases.missing;
  end_phase_if_complete(phases);
}

void Machine::wait(uint64_t* barrier, int parity, Site site) {
  thread().site = site;
  Phases& phases = phases_of(barrier);
  while ((phases.phase & 1) == parity) suspend(phases.waiting, "a barrier");
  if (phases.released != nullptr) thread().seen = joined(thread().seen, phases.released);
}

// --- copies

void Machine::start(Copy copy) {
  Thread& mine = thread();
  mine.site = copy.site;
  const int unit = 16;
  if (copy.bytes <= 0 || copy.bytes % unit != 0 || !is_aligned(copy.to, unit) ||
      !is_aligned(copy.from, unit)) {
    fail("copies " + std::to_string(copy.bytes) +
         " bytes that are not so many times 16, or not aligned to 16, at " + text(copy.site));
  }
  if (!is_ours(copy.to, copy.bytes)) fail("copies beyond its shared memory at " + text(copy.site));
  if (copy.barrier != nullptr) phases_of(copy.barrier);
  copy.thread = current_;
  copy.group = mine.group;
  copy.place = static_cast<int>(threads_.size()) + next_copy_;
  copy.clock = ++copy_clocks_[next_copy_];
  next_copy_ = (next_copy_ + 1) % kCopies;
  copy.seen = release();
  copies_.push_back(copy);
  if (!schedule_.copies_land_late) land(copies_.back());
  while (!copies_.empty() && copies_.front().has_landed && copies_.front().barrier != nullptr)
    copies_.pop_front();
}

void Machine::land(Copy& copy) {
  copy.has_landed = true;
  if (checker() != nullptr) checker()->copied(*this, copy);
  std::memcpy(copy.to, copy.from, copy.bytes);
  if (copy.barrier == nullptr) return;
  auto seen = std::make_shared<Clocks>(*copy.seen);
  (*seen)[copy.place] = copy.clock;
  Phases& phases = barriers_.at(copy.barrier);
  phases.coming = joined(phases.coming, seen);
  phases.bytes -= copy.bytes;
  end_phase_if_complete(phases);
}

bool Machine::land_any() {
  std::vector<Copy*> left;
  for (Copy& copy : copies_) {
    if (!copy.has_landed && copy.barrier != nullptr) left.push_back(&copy);
  }
  if (left.empty()) return false;
  land(*left[random_() % left.size()]);
  return true;
}

void Machine::wait_groups(int groups_left, Site site) {
  Thread& mine = thread();
  mine.site = site;
  auto seen = std::make_shared<Clocks>(*mine.seen);
  std::deque<Copy> others;
  for (Copy& copy : copies_) {
    const bool is_waited =
        copy.barrier == nullptr && copy.thread == current_ && copy.group < mine.group - groups_left;
    if (!is_waited) {
      others.push_back(copy);
      continue;
    }
    if (!copy.has_landed) land(copy);
    (*seen)[copy.place] = std::max((*seen)[copy.place], copy.clock);
  }
  copies_ = others;
  mine.seen = seen;
}

// --- what a kernel calls

void run(const Grid& grid, const std::function<void()>& kernel) { Machine(grid, kernel).run(); }

const Thread& here() {
  if (running == nullptr) throw Fault("not in a kernel");
  return running->thread();
}

int thread_index() { return here().index; }
int block_index() { return here().block; }
int cluster_rank() { return here().rank; }
const Grid& grid() { return running->grid(); }
unsigned char* shared_memory() { return here().shared; }
void wait_block(Site site) { running->meet_block(site); }
void wait_cluster(Site site, bool arrives, bool waits) {
  running->meet_cluster(site, arrives, waits);
}
void wait_warp(Site site) { running->meet_warp(0, site, true); }
const uint64_t* exchange(uint64_t value, Site site) {
  return running->meet_warp(value, site, false);
}
void* of_rank(void* shared, int rank, Site site) { return running->of_rank(shared, rank, site); }
void barrier_init(uint64_t* barrier, int arrivals, Site site) {
  running->init(barrier, arrivals, site);
}
void barrier_arrive(uint64_t* barrier, int64_t bytes, Site site) {
  running->arrive(barrier, bytes, site);
}
void barrier_wait(uint64_t* barrier, int parity, Site site) {
  running->wait(barrier, parity, site);
}
void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, Site site) {
  Copy copy{shared, global, bytes, barrier};
  copy.site = site;
  running->start(copy);
}
void copy_async(void* shared, const void* global, int bytes, Site site) {
  Copy copy{shared, global, bytes, nullptr};
  copy.site = site;
  running->start(copy);
}
void commit_async() { ++running->thread().group; }
void wait_async(int groups_left, Site site) { running->wait_groups(groups_left, site); }
void begin_atomic() {
  if (checker() != nullptr) checker()->set_atomic(true);
}
void end_atomic() {
  if (checker() != nullptr) checker()->set_atomic(false);
}

}  // namespace modxfer::emulator
