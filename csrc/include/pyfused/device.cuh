// What does every CUDA kernel need, whatever the operator? Vectors of 16 bytes, conversions, reductions in fixed order.
// Framework-free. All kernels start with PYFUSED_LAUNCH, so a host shim can run the same source.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// A host compiler cannot parse a launch or the block's dynamic shared memory, PYFUSED_SHARED_BYTES(name). The host shim
// defines its own versions of both.
#ifndef PYFUSED_CUDA_ON_CPU
#define PYFUSED_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define PYFUSED_SHARED_BYTES(name) extern __shared__ __align__(128) unsigned char name[]
#endif

// The type of bfloat16 values. tests/cuda_on_cpu/shim.py names float16's where only addresses count, to compile half as much.
#ifndef PYFUSED_BFLOAT16
#define PYFUSED_BFLOAT16 __nv_bfloat16
#endif

// Runs the statement with T as the dtype of a code.
#define PYFUSED_BY_DTYPE(dtype, ...) \
  if (dtype == 0) {                  \
    using T = float;                 \
    __VA_ARGS__                      \
  } else if (dtype == 1) {           \
    using T = __half;                \
    __VA_ARGS__                      \
  } else {                           \
    using T = PYFUSED_BFLOAT16;      \
    __VA_ARGS__                      \
  }

namespace pyfused {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T> __device__ inline T narrow(float v);
template <> __device__ inline float narrow<float>(float v) { return v; }
template <> __device__ inline __half narrow<__half>(float v) { return __float2half_rn(v); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// V elements that one instruction loads. V * sizeof(T) is 16 if the launcher found everything aligned; else V is 1.
template <class T, int V> struct alignas(V * sizeof(T)) Pack {
  T at[V];
};

template <int V, class T> __device__ inline Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T> __device__ inline void store(T* p, const Pack<T, V>& v) {
  *reinterpret_cast<Pack<T, V>*>(p) = v;
}

// 2^x in one instruction, within 2 units in the last place; subnormal results are zeros.
__device__ inline float fast_exp2(float x) {
#ifndef PYFUSED_CUDA_ON_CPU
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// The sum over a warp. Every lane gets the same bits, because both lanes of a step add the same two values.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

// The sum over a block of whole warps. Every thread calls it and gets the sum. `scratch` holds a float for each warp.
__device__ inline float block_sum(float v, float* scratch) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  v = warp_sum(v);
  if (lane == 0) scratch[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = warp_sum(lane < warps ? scratch[lane] : 0.0f);
  __syncthreads();  // scratch may be written again
  return v;
}

}  // namespace pyfused
