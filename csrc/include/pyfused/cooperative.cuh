// How does one kernel run in phases over the whole chip? A cooperative launch, floats that blocks send to each other, a barrier.
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

// ---- floats for other blocks ----------------------------------------------------------------------------------------
// A float tells by itself whether it has been sent. Memory starts as kAbsent, bits that no float is sent with, and a reader
// looks until it finds other bits. So a float is on its way once: one trip to the L2 and one back. With a barrier the fence
// behind the writes, the arrival and the polls come before the first read. A word is sent once in a launch.
constexpr unsigned kAbsent = 0xffffffffu;  // a NaN that no instruction makes
constexpr int kAbsentByte = 0xff;          // for cudaMemsetAsync

__device__ inline void send(float* to, float value) {
  if (__float_as_uint(value) == kAbsent) value = __uint_as_float(0x7fffffffu);
#ifdef PYFUSED_CUDA_ON_CPU
  *to = value;
#else
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
#endif
}

// One look at V floats, an access of 16 bytes or of 4.
template <int V> __device__ inline Pack<float, V> look(const float* from) {
  static_assert(V == 1 || V == 4, "one access");
  Pack<float, V> out;
#ifdef PYFUSED_CUDA_ON_CPU
  memcpy(&out, from, sizeof out);
#else
  if constexpr (V == 1) asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(out.at[0]) : "l"(from));
  else
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(out.at[0]), "=f"(out.at[1]), "=f"(out.at[2]), "=f"(out.at[3])
                 : "l"(from));
#endif
  return out;
}

// Whether the first `count` of V floats have been sent.
template <int V> __device__ inline bool has_come(const Pack<float, V>& found, int count) {
  bool absent = false;
#pragma unroll
  for (int e = 0; e < V; ++e) absent |= e < count && __float_as_uint(found.at[e]) == kAbsent;
  return !absent;
}

// Waits for COUNT times V floats, looks at all together, and looks again at what has not come. If that is much, it looks at the
// first until that has come: idle looks take the L2's time from others. from(i) is an address, or null for what nobody wants;
// floats(i) says how many of the V will be sent.
constexpr int kMuch = 7;
template <int COUNT, int V, class From, class Floats>
__device__ inline void receive(Pack<float, V> (&found)[COUNT], const From& from, const Floats& floats) {
  unsigned missing = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) missing |= (from(i) ? 1u : 0u) << i;
  while (missing) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (missing >> i & 1) found[i] = look<V>(from(i));
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (has_come(found[i], floats(i))) missing &= ~(1u << i);
    if constexpr (COUNT >= kMuch)
      if (__popc(missing) >= kMuch) {
        const float* first = nullptr;
        int count = 0;
#pragma unroll
        for (int i = COUNT - 1; i >= 0; --i)
          if (missing >> i & 1) first = from(i), count = floats(i);
        while (!has_come(look<V>(first), count)) {
#ifdef PYFUSED_CUDA_ON_CPU
          cuda_on_cpu::look_again({"receive", __FILE__, __LINE__});
#endif
        }
        continue;
      }
#ifdef PYFUSED_CUDA_ON_CPU
    if (missing) cuda_on_cpu::look_again({"receive", __FILE__, __LINE__});
#endif
  }
}

// ---- barrier --------------------------------------------------------------------------------------------------------
// A barrier for all threads of the grid: what they wrote before arrive() can be read behind wait(), but not through the L1: use
// __ldcg. Work between the two costs no time while other blocks are late. Its requests to memory come behind the arrival's fence,
// which would wait for them. All blocks poll the word that they add to: with another word for the release, the last block's
// answer and its store, two trips to the L2, would come between the last arrival and the first poll that sees it.
struct GridBarrier {
  unsigned* counter;            // kAbsent before the launch
  unsigned turn = 0x80000000u;  // in its highest bit, which a barrier changes: each takes 2^31 from the counter in all

  __device__ void arrive() const {
#ifndef PYFUSED_CUDA_ON_CPU
    __syncthreads();
    if (threadIdx.x == 0) {
      const unsigned share = blockIdx.x == 0 ? 0x80000000u + (gridDim.x - 1) : ~0u;
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

}  // namespace pyfused
