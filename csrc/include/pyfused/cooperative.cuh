// How does one kernel run in phases over the whole chip? A cooperative launch and a barrier for its grid.
//
// A cooperative launch fails unless all blocks fit on the chip at once, so a block may wait for all others. A CUDA graph can
// capture it. The host shim (tests/cuda_on_cpu) has its own versions of both.
#pragma once

#include "pyfused/device.cuh"

#ifndef PYFUSED_CUDA_ON_CPU
#define PYFUSED_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...) \
  ::pyfused::launch_cooperative(kernel, grid, block, shared, (cudaStream_t)(stream), __VA_ARGS__)
#define PYFUSED_GRID_CONSTANT __grid_constant__
#else
#define PYFUSED_GRID_CONSTANT
#endif

namespace pyfused {

#ifndef PYFUSED_CUDA_ON_CPU
// Launch::check() reports an error.
template <class A>
void launch_cooperative(void (*kernel)(A), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const A& argument) {
  void* arguments[] = {const_cast<A*>(&argument)};
  cudaLaunchCooperativeKernel((const void*)kernel, grid, block, arguments, shared, stream);
}
#endif

// Waits for all threads of the grid. What they wrote before it can be read behind it, but not through the L1: use __ldcg.
// *counter is 0 before the first launch. Each barrier adds 2^31 to it in all, so waiting is over when the highest bit
// changes, and the next barrier or launch needs no reset. `name` is for the shim's messages.
__device__ inline void grid_barrier([[maybe_unused]] unsigned* counter, [[maybe_unused]] const char* name) {
#ifdef PYFUSED_CUDA_ON_CPU
  cuda_on_cpu::grid_barrier({name, __FILE__, __LINE__});
#else
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned share = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
    unsigned before, now;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(share) : "memory");
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (((before ^ now) & 0x80000000u) == 0);
  }
  __syncthreads();
#endif
}

// Fetches a line of 128 bytes into the L2, without waiting.
__device__ inline void prefetch_l2([[maybe_unused]] const void* p) {
#ifndef PYFUSED_CUDA_ON_CPU
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// V neighbours that another block may have written, past the L1; V * sizeof(T) is 16.
template <int V, class T> __device__ inline Pack<T, V> load_shared_by_grid(const T* p) {
  static_assert(V * sizeof(T) == 16, "one access");
  const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(p));
  Pack<T, V> out;
  memcpy(&out, &bits, 16);
  return out;
}

}  // namespace pyfused
