// Fibers: functions on stacks of their own that leave and enter each other.
//
// A fiber is made once with makecontext and from then on entered and left with _setjmp and
// _longjmp, which do without the system calls of swapcontext. What includes this undefines
// _FORTIFY_SOURCE before anything else: the checked longjmp refuses to change stacks.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace kdk::gpu {

// Frames under AddressSanitizer, and its reports, are larger.
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kStackBytes = 256 << 10;
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif

inline void jump(const ucontext_t& to) { setcontext(&to); }

struct Registers {
  jmp_buf buffer;
};

// The longjmp of AddressSanitizer forgets the red zones of the stack that it leaves, and
// swapcontext those of the one that it enters. The C library's own longjmp leaves both alone.
#ifdef __SANITIZE_ADDRESS__
inline void jump(Registers& to) {
  using Longjmp = void (*)(jmp_buf, int);
  static const auto longjmp_of_libc =
      reinterpret_cast<Longjmp>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));
  longjmp_of_libc(to.buffer, 1);
}
#else
inline void jump(Registers& to) { _longjmp(to.buffer, 1); }
#endif

// Returns when something jumps to `from`.
template <typename Target>
void switch_registers(Registers& from, Target& to) {
  if (_setjmp(from.buffer) == 0) jump(to);
}

struct Context {
  Registers registers;
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

inline void announce_switch([[maybe_unused]] Context& from, [[maybe_unused]] const Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
}

inline void confirm_switch([[maybe_unused]] const Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(to.fake_stack, nullptr, nullptr);
#endif
}

inline void switch_context(Context& from, Context& to) {
  announce_switch(from, to);
  switch_registers(from.registers, to.registers);
  confirm_switch(from);
}

// A stack with a page below it that may not be touched.
class Stack {
 public:
  Stack() : guard_bytes_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
    base_ = mmap(nullptr, guard_bytes_ + kStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_, guard_bytes_, PROT_NONE);
  }
  ~Stack() { munmap(base_, guard_bytes_ + kStackBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  void* bottom() const { return static_cast<char*>(base_) + guard_bytes_; }

 private:
  std::size_t guard_bytes_;
  void* base_;
};

// Runs body(), which never returns, on its own stack. Constructed, it waits to be entered.
class Fiber {
 public:
  Fiber(Context& creator, void (*body)()) : creator_(creator), body_(body) {
    context.stack = stack_.bottom();
    context.stack_bytes = kStackBytes;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack_.bottom();
    start.uc_stack.ss_size = kStackBytes;
    start.uc_link = nullptr;
    makecontext(&start, &Fiber::enter, 0);
    newborn = this;
    announce_switch(creator_, context);
    switch_registers(creator_.registers, start);
    confirm_switch(creator_);
  }

  Context context;

 private:
  static void enter() {
    Fiber& fiber = *newborn;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &fiber.creator_.stack, &fiber.creator_.stack_bytes);
#endif
    switch_context(fiber.context, fiber.creator_);
    fiber.body_();
  }

  static inline thread_local Fiber* newborn = nullptr;

  Stack stack_;
  Context& creator_;
  void (*body_)();
};

}  // namespace kdk::gpu
