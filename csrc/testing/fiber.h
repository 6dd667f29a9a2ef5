// Threads of control that a scheduler switches by hand, each on a stack of its own.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace modxfer::emulator {

// A stack with a page below it that no one may touch.
class Stack {
 public:
  explicit Stack(size_t size) : guard_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), size_(size) {
    void* memory = mmap(nullptr, guard_ + size_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, guard_, PROT_NONE);
    memory_ = static_cast<char*>(memory);
  }
  ~Stack() {
    if (memory_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_, guard_ + size_);  // for who gets it next
#endif
    munmap(memory_, guard_ + size_);
  }
  Stack(Stack&& other) noexcept : memory_(other.memory_), guard_(other.guard_), size_(other.size_) {
    other.memory_ = nullptr;
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return memory_ + guard_; }
  size_t size() const { return size_; }

 private:
  char* memory_;
  size_t guard_, size_;
};

// Where a thread of control goes on; one that is default-made stands for the caller's own stack.
class Context {
 public:
  Context() = default;
  Context(const Stack& stack, void (*entry)());

  // Saves the caller here and goes on at `next`. A caller that `ends` is never gone back to.
  void go_to(Context& next, bool ends = false);
  // The first thing that an entry does.
  static void arrived();

 private:
#if defined(__x86_64__)
  void* top_ = nullptr;
#else
  ucontext_t context_;
#endif
  const void* bottom_ = nullptr;  // of the stack, as sanitizers want to know it
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
  static inline Context* from_ = nullptr;
};

#if defined(__x86_64__)

// Pushes what a callee preserves, changes the stack, pops the same.
extern "C" void modxfer_switch(void** save, void* next);
asm(R"(
.text
.weak modxfer_switch
.type modxfer_switch,@function
modxfer_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size modxfer_switch,.-modxfer_switch
)");

inline Context::Context(const Stack& stack, void (*entry)())
    : bottom_(stack.bottom()), size_(stack.size()) {
  auto* top = reinterpret_cast<void**>(stack.bottom() + stack.size());
  *--top = nullptr;  // a return address for the entry, which does not return, and its alignment
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  top_ = top;
}

#else

inline Context::Context(const Stack& stack, void (*entry)())
    : bottom_(stack.bottom()), size_(stack.size()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack.bottom();
  context_.uc_stack.ss_size = stack.size();
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

#endif

inline void Context::go_to(Context& next, bool ends) {
  from_ = this;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake_stack_, next.bottom_, next.size_);
#else
  (void)ends;
#endif
#if defined(__x86_64__)
  modxfer_switch(&top_, next.top_);
#else
  swapcontext(&context_, &next.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  // back again, and the one who came here may have been the caller's own stack
  __sanitizer_finish_switch_fiber(fake_stack_, &from_->bottom_, &from_->size_);
#endif
}

inline void Context::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from_->bottom_, &from_->size_);
#endif
}

}  // namespace modxfer::emulator
