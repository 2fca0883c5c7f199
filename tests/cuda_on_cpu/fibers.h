// How does a thread of a kernel stop and go on? It is a fiber: a stack, and the place where it stopped.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 256 * 1024, kGuard = 4096;

// On x86-64 the switch is written out: swapcontext makes two system calls.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
void prepare(Context& c, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // keeps the stack aligned as a call would
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack_pointer = top;
}
void jump(Context& from, Context& to) { cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t at;
};
void prepare(Context& c, unsigned char* stack, void (*entry)()) {
  getcontext(&c.at);
  c.at.uc_stack.ss_sp = stack;
  c.at.uc_stack.ss_size = kStack;
  c.at.uc_link = nullptr;
  makecontext(&c.at, entry, 0);
}
void jump(Context& from, Context& to) { swapcontext(&from.at, &to.at); }
#endif

// AddressSanitizer hears of each switch, and forgets the red zones of frames that are never left.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
void begin_switch(void** fake, const void* stack, size_t size) { __sanitizer_start_switch_fiber(fake, stack, size); }
void end_switch(void* fake, const void** stack, size_t* size) { __sanitizer_finish_switch_fiber(fake, stack, size); }
void forget_frames(unsigned char* from, size_t size) { __asan_unpoison_memory_region(from, size); }
#else
constexpr bool kSanitized = false;
void begin_switch(void**, const void*, size_t) {}
void end_switch(void*, const void**, size_t*) {}
void forget_frames(unsigned char*, size_t) {}
#endif

// Stacks outlive a launch: mapping them is slow. Below each lies a page that must not be touched.
std::vector<unsigned char*> stacks;
unsigned char* stack_of(size_t index) {
  while (stacks.size() <= index) {
    void* p = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    mprotect(p, kGuard, PROT_NONE);
    stacks.push_back(static_cast<unsigned char*>(p) + kGuard);
  }
  return stacks[index];
}

}  // namespace
}  // namespace cuda_on_cpu
