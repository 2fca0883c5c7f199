// What may a kernel source use when it is compiled as plain C++? The part of CUDA's language and runtime that pyfused's
// kernels use, on the engine's fibers. Include order and names are CUDA's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "engine.h"

// ---- language -------------------------------------------------------------------------------------------------------
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ static const
#define __shared__ static  // shim.py renames the section in which a .cu file's statics lie
#define PYFUSED_SHARED_BYTES(name) unsigned char* const name = ::cuda_on_cpu::now.dynamic_shared
#define PYFUSED_LAUNCH(kernel, grid, block, shared, stream, ...)                                                  \
  ((void)(stream), ::cuda_on_cpu::launch((const void*)(kernel), #kernel, dim3(grid), dim3(block), shared, false, \
                                         [&] { (kernel)(__VA_ARGS__); }))
#define PYFUSED_LAUNCH_COOPERATIVE(kernel, grid, block, shared, stream, ...)                                     \
  ((void)(stream), ::cuda_on_cpu::launch((const void*)(kernel), #kernel, dim3(grid), dim3(block), shared, true, \
                                         [&] { (kernel)(__VA_ARGS__); }))

#define threadIdx (::cuda_on_cpu::now.thread)
#define blockIdx (::cuda_on_cpu::now.block)
#define blockDim (::cuda_on_cpu::now.block_dim)
#define gridDim (::cuda_on_cpu::now.grid_dim)
constexpr int warpSize = 32;

#define CUDA_ON_CPU_VECTOR(T, name)                                                                             \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                            \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };                            \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                    \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTOR(float, float)
CUDA_ON_CPU_VECTOR(int, int)
CUDA_ON_CPU_VECTOR(unsigned, uint)
#undef CUDA_ON_CPU_VECTOR

// ---- barriers and warp operations -----------------------------------------------------------------------------------
#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block_barrier({"__syncthreads", file, line}, 0); }
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier({"__syncthreads_count", file, line}, predicate != 0);
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier({"__syncthreads_or", file, line}, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier({"__syncthreads_and", file, line}, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::warp_operation({"__syncwarp", file, line}, mask, nullptr, [](void**) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace cuda_on_cpu {

template <class T> struct Exchange {
  T value, result;
  int from;
  bool missing;
};

// Each lane gets the value of the lane `from`, which must be in the mask.
template <class T> T shuffle(Site site, unsigned mask, T value, int from) {
  static_assert(std::is_trivially_copyable<T>::value, "a shuffle moves bytes");
  Exchange<T> mine{value, value, from, false};
  warp_operation(site, mask, &mine, [](void** lanes) {
    for (int l = 0; l < 32; ++l) {
      if (!lanes[l]) continue;
      auto* to = static_cast<Exchange<T>*>(lanes[l]);
      auto* source = static_cast<Exchange<T>*>(lanes[to->from & 31]);
      to->missing = !source;
      if (source) to->result = source->value;
    }
  });
  if (mine.missing) broken(site, "the source lane is not in the mask");
  return mine.result;
}

struct Vote {
  bool yes;
  unsigned ballot;
};
inline unsigned vote(Site site, unsigned mask, bool yes) {
  Vote mine{yes, 0};
  warp_operation(site, mask, &mine, [](void** lanes) {
    unsigned ballot = 0;
    for (int l = 0; l < 32; ++l)
      if (lanes[l] && static_cast<Vote*>(lanes[l])->yes) ballot |= 1u << l;
    for (int l = 0; l < 32; ++l)
      if (lanes[l]) static_cast<Vote*>(lanes[l])->ballot = ballot;
  });
  return mine.ballot;
}

}  // namespace cuda_on_cpu

template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::lane(), base = lane & ~(width - 1);
  return cuda_on_cpu::shuffle({"__shfl_sync", file, line}, mask, value, base + (from & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::lane(), from = lane ^ bits;
  return cuda_on_cpu::shuffle({"__shfl_xor_sync", file, line}, mask, value, from / width > lane / width ? lane : from);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::lane(), from = lane + (int)by;
  return cuda_on_cpu::shuffle({"__shfl_down_sync", file, line}, mask, value, from / width == lane / width ? from : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_SITE) {
  const int lane = cuda_on_cpu::lane(), inside = lane & (width - 1);
  return cuda_on_cpu::shuffle({"__shfl_up_sync", file, line}, mask, value, inside >= (int)by ? lane - (int)by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote({"__ballot_sync", file, line}, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote({"__any_sync", file, line}, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote({"__all_sync", file, line}, mask, predicate != 0) == mask;
}
inline unsigned __activemask() = delete;  // what it gives depends on the schedule

// ---- atomics: one thread runs at a time ------------------------------------------------------------------------------
template <class T, class F> T cuda_on_cpu_atomic(T* p, F&& change) {
  const T before = *p;
  *p = change(before);
  return before;
}
template <class T> T atomicAdd(T* p, T v) { return cuda_on_cpu_atomic(p, [&](T b) { return T(b + v); }); }
template <class T> T atomicMax(T* p, T v) { return cuda_on_cpu_atomic(p, [&](T b) { return b < v ? v : b; }); }
template <class T> T atomicMin(T* p, T v) { return cuda_on_cpu_atomic(p, [&](T b) { return v < b ? v : b; }); }
template <class T> T atomicExch(T* p, T v) { return cuda_on_cpu_atomic(p, [&](T) { return v; }); }
template <class T> T atomicCAS(T* p, T compare, T v) {
  return cuda_on_cpu_atomic(p, [&](T b) { return b == compare ? v : b; });
}

// ---- arithmetic ------------------------------------------------------------------------------------------------------
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled without contraction
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline float __expf(float a) { return expf(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float exp10f(float a) { return powf(10.0f, a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
template <class To, class From> To cuda_on_cpu_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To out;
  memcpy(&out, &v, sizeof(To));
  return out;
}
inline int __float_as_int(float v) { return cuda_on_cpu_bits<int>(v); }
inline unsigned __float_as_uint(float v) { return cuda_on_cpu_bits<unsigned>(v); }
inline float __int_as_float(int v) { return cuda_on_cpu_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return cuda_on_cpu_bits<float>(v); }
template <class A, class B> auto min(A a, B b) -> typename std::common_type<A, B>::type {
  using C = typename std::common_type<A, B>::type;
  return C(a) < C(b) ? C(a) : C(b);
}
template <class A, class B> auto max(A a, B b) -> typename std::common_type<A, B>::type {
  using C = typename std::common_type<A, B>::type;
  return C(a) < C(b) ? C(b) : C(a);
}

// ---- runtime ---------------------------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrCooperativeLaunch = 95 };
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
