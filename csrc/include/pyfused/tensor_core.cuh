// How does a warp multiply 16-bit tiles, and how does a tile reach shared memory without passing through registers?
// mma.sync, ldmatrix and cp.async (sm_80 and later). Where the sources are compiled for the CPU, the host shim
// (tests/cuda_on_cpu) defines the same functions.
#pragma once

#include "pyfused/device.cuh"
#ifdef PYFUSED_CUDA_ON_CPU
#include "tensor_core.h"
#endif

namespace pyfused {

#ifndef PYFUSED_CUDA_ON_CPU  // the shim's tensor_core.h defines them there

__device__ inline unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Loads four 8x8 matrices of 16-bit elements. Lane l gives the aligned address of row l % 8 (16 bytes) of matrix l / 8.
// out[m] gets matrix m's element (l / 4, l % 4 * 2) and the next one. All lanes of the warp call it.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed.
__device__ inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8, float32) += a (16x16, rows) b (16x8, columns). Lane l, g = l / 4, t = l % 4 * 2:
// d: (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1); a: pairs at (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8);
// b: pairs at (t, g), (t + 8, g), along its first index.
template <class T> __device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts copying 16 bytes from global to shared memory, both aligned. If !inside, it writes zeros and reads nothing. The
// bytes are there for this thread after cp_async_wait, for other threads after a later barrier.
__device__ inline void cp_async16(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}

// Closes the group of copies started since the last one; cp_async_wait<N> waits for all groups but the newest N.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

#endif

// Two numbers as the 16-bit pair for mma, `low` at the lower index.
template <class T> __device__ inline uint32_t pack2(float low, float high) {
  Pack<T, 2> pair;
  pair.at[0] = narrow<T>(low), pair.at[1] = narrow<T>(high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

}  // namespace pyfused
