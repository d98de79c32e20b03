// A fiber: a stack of its own that the one OS thread runs on until it switches to another fiber.
// ThreadSanitizer and AddressSanitizer, if they are linked in, are told which fiber is running.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "sanitizers.h"
#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __x86_64__
// Pushes the registers that the System V ABI preserves over a call and pops another fiber's. It
// takes 11 ns; swapcontext takes 208, because it saves the signal mask too.
extern "C" __attribute__((visibility("hidden"))) void deeplab_fast_switch_stack(void** save,
                                                                                void* to);
#endif

namespace deeplab_fast::emulator {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { free_stack(); }

  // Makes the next switch to this fiber call entry, which must never return.
  void start(void (*entry)()) {
    // A thread of another block ran on this stack before, in no order with this one. Memory that is
    // mapped anew keeps ThreadSanitizer from reporting a race between them.
    if (__tsan_create_fiber) free_stack();
    if (!stack_) allocate_stack();
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack_, kStackBytes);
    if (__tsan_create_fiber) tsan_ = __tsan_create_fiber(0);
    bottom_ = stack_;
    size_ = kStackBytes;
    asan_ = nullptr;
    entry_ = entry;
#ifdef __x86_64__
    constexpr int kSavedRegisters = 6;
    auto** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kStackBytes);
    top[-2] = reinterpret_cast<void*>(&Fiber::enter);  // so the stack is aligned as after a call
    sp_ = top - 2 - kSavedRegisters;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    makecontext(&context_, &Fiber::enter, 0);
#endif
  }

  // Drops ThreadSanitizer's record of a fiber that will not run again.
  void forget() {
    if (__tsan_destroy_fiber && tsan_) __tsan_destroy_fiber(tsan_);
    tsan_ = nullptr;
  }

  // Runs `to` until something switches back here. With `dies`, nothing ever will.
  void switch_to(Fiber& to, bool dies = false) {
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan_, kTsanNoSync);
    if (__sanitizer_start_switch_fiber)
      __sanitizer_start_switch_fiber(dies ? nullptr : &asan_, to.bottom_, to.size_);
    previous_ = this;
    current_ = &to;
#ifdef __x86_64__
    deeplab_fast_switch_stack(&sp_, to.sp_);
#else
    swapcontext(&context_, &to.context_);
#endif
    finish_switch();
  }

  // Makes this the fiber of the OS thread's own stack, before it switches to another.
  void adopt_current_thread() {
    if (__tsan_get_current_fiber) tsan_ = __tsan_get_current_fiber();
  }

  void* tsan() const { return tsan_; }

 private:
  static constexpr size_t kStackBytes = 512 * 1024;  // of address space; only touched pages count

  void allocate_stack() {
    stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) {
      stack_ = nullptr;
      throw std::bad_alloc();
    }
    mprotect(stack_, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);  // overflow faults
  }

  void free_stack() {
    if (stack_) munmap(stack_, kStackBytes);
    stack_ = nullptr;
  }

  static void finish_switch() {
    if (__sanitizer_finish_switch_fiber)
      __sanitizer_finish_switch_fiber(current_->asan_, &previous_->bottom_, &previous_->size_);
  }

  static void enter() {
    finish_switch();
    current_->entry_();
    __builtin_trap();
  }

  static inline Fiber* current_ = nullptr;
  static inline Fiber* previous_ = nullptr;

  void* stack_ = nullptr;
  void (*entry_)() = nullptr;
  void* tsan_ = nullptr;
  void* asan_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#ifdef __x86_64__
  void* sp_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace deeplab_fast::emulator
