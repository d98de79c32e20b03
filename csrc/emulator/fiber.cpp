#include "fiber.h"

#ifdef __x86_64__
asm(R"(
.text
.globl deeplab_fast_switch_stack
.hidden deeplab_fast_switch_stack
.type deeplab_fast_switch_stack, @function
deeplab_fast_switch_stack:
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
.size deeplab_fast_switch_stack, . - deeplab_fast_switch_stack
)");
#endif
