// How does a CUDA kernel run on a CPU? Every thread of a block is a fiber; a barrier or a warp-wide operation suspends it
// until all that take part have come. What a kernel source sees of it is in cuda_runtime.h.
//
// Strict where CUDA leaves things undefined: a barrier that some thread of the block never reaches, or reaches at another
// line, is an error with the place and the threads in its message, and so is a warp operation that a lane of its mask misses.
// Shared memory starts as NaN bytes in every block. A copy started by cp.async lands when its thread waits for it, and
// what it will overwrite reads as NaN until then. Threads and blocks run in one of several orders (set_order): a result that
// depends on the order shows a missing barrier.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

// What the running thread is told of itself.
struct Now {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  unsigned char* dynamic_shared;
};
extern Now now;

struct Site {
  const char* what;
  const char* file;
  int line;
};

using Body = void (*)(const void*);
// Runs a kernel over its grid; a rule broken by it becomes the error that cudaGetLastError returns.
void launch(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared, bool cooperative, Body body,
            const void* context);

template <class F>
void launch(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared, bool cooperative, const F& run) {
  launch(kernel, name, grid, block, shared, cooperative, [](const void* f) { (*static_cast<const F*>(f))(); }, &run);
}

// Waits for the whole block; `sum` of all threads' values comes back.
int block_barrier(Site site, int value);
// Waits for every block of a cooperative launch.
void grid_barrier(Site site);
// A thread of a cooperative launch has not found what it waits for in memory: the others run.
void look_again(Site site);

// Waits for the lanes of `mask`; the last to come calls apply once, with every lane's `mine` (null outside the mask).
using Apply = void (*)(void** lanes);
void warp_operation(Site site, unsigned mask, void* mine, Apply apply);
unsigned lane();

// Ends the launch: the kernel broke a rule of CUDA.
[[noreturn]] void broken(Site site, const char* rule);

void async_copy(void* to, const void* from, size_t bytes);
void async_commit();
void async_wait(int newest_left);

}  // namespace cuda_on_cpu
