// How does one kernel run in phases over the whole chip? A cooperative launch and a barrier for its grid.
//
// A cooperative launch fails unless all blocks fit on the chip at once, so a block may wait for all others. A CUDA graph can
// capture it. The host shim (tests/cuda_on_cpu) has its own versions of both.
#pragma once

#include <type_traits>

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

// A barrier for all threads of the grid: what they wrote before arrive() can be read behind wait(), but not through the L1: use
// __ldcg. Work between the two costs no time while other blocks are late. Its requests to memory come behind the arrival's fence,
// which would wait for them. All blocks poll the word that they add to: with another word for the release, the last block's
// answer and its store, two trips to the L2, would come between the last arrival and the first poll that sees it.
struct GridBarrier {
  unsigned* counter;  // 0 before the launch
  unsigned turn = 0;  // in its highest bit, which a barrier changes: each adds 2^31 to the counter in all

  __device__ void arrive() const {
#ifndef PYFUSED_CUDA_ON_CPU
    __syncthreads();
    if (threadIdx.x == 0) {
      const unsigned share = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1;
      asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(share) : "memory");
    }
#endif
  }

  // `name` is for the shim's messages.
  __device__ void wait([[maybe_unused]] const char* name) {
#ifdef PYFUSED_CUDA_ON_CPU
    cuda_on_cpu::grid_barrier({name, __FILE__, __LINE__});
#else
    turn ^= 0x80000000u;
    if (threadIdx.x == 0) {
      unsigned now;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
      } while ((now ^ turn) & 0x80000000u);
    }
    __syncthreads();
#endif
  }
};

// Fetches a line of 128 bytes into the L2, without waiting.
__device__ inline void prefetch_l2([[maybe_unused]] const void* p) {
#ifndef PYFUSED_CUDA_ON_CPU
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// V neighbours that another block may have written, past the L1; V * sizeof(T) is 8 or 16.
template <int V, class T> __device__ inline Pack<T, V> load_shared_by_grid(const T* p) {
  using Bits = std::conditional_t<V * sizeof(T) == 8, uint2, uint4>;
  static_assert(V * sizeof(T) == sizeof(Bits), "one access");
  const Bits bits = __ldcg(reinterpret_cast<const Bits*>(p));
  Pack<T, V> out;
  memcpy(&out, &bits, sizeof(Bits));
  return out;
}

}  // namespace pyfused
