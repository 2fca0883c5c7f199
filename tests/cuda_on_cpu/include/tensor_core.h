// mma.sync, ldmatrix and cp.async as operations of a whole warp on the engine; the layouts are those of PTX, chapter
// "Warp-level matrix instructions". Stands in for the PTX part of pyfused/tensor_core.cuh.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace pyfused {

namespace on_cpu {

struct Matrices {
  const void* row;
  uint32_t* out;
};

inline void load_matrices(cuda_on_cpu::Site site, uint32_t (&out)[4], const void* row, bool transposed) {
  Matrices mine{row, out};
  const cuda_on_cpu::Apply plain = [](void** lanes) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) {
        const auto* source = static_cast<Matrices*>(lanes[m * 8 + l / 4])->row;
        memcpy(&static_cast<Matrices*>(lanes[l])->out[m], static_cast<const uint16_t*>(source) + l % 4 * 2, 4);
      }
  };
  const cuda_on_cpu::Apply turned = [](void** lanes) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const auto* source = static_cast<Matrices*>(lanes[m * 8 + l % 4 * 2 + i])->row;
          pair[i] = static_cast<const uint16_t*>(source)[l / 4];
        }
        memcpy(&static_cast<Matrices*>(lanes[l])->out[m], pair, 4);
      }
  };
  if (reinterpret_cast<uintptr_t>(row) % 16) cuda_on_cpu::broken(site, "not aligned to 16 bytes");
  cuda_on_cpu::warp_operation(site, 0xffffffffu, &mine, transposed ? turned : plain);
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

inline float half_of(uint32_t pair, int i, __half*) { return __half2float({(uint16_t)(pair >> (16 * i))}); }
inline float half_of(uint32_t pair, int i, __nv_bfloat16*) { return __bfloat162float({(uint16_t)(pair >> (16 * i))}); }

typedef float Columns __attribute__((vector_size(32)));  // one row of d, or of b

template <class T> void multiply(void** lanes) {
  float a[16][16];
  Columns b[16], d[16];
  for (int l = 0; l < 32; ++l) {
    const auto* p = static_cast<const Product*>(lanes[l]);
    const int g = l / 4, t = l % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 8 + i] = half_of(p->a[r], i, (T*)nullptr);
      for (int r = 0; r < 2; ++r) b[t + r * 8 + i][g] = half_of(p->b[r], i, (T*)nullptr);
    }
  }
  for (int row = 0; row < 16; ++row) {
    d[row] = Columns{};
    for (int k = 0; k < 16; ++k) d[row] += a[row][k] * b[k];
  }
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r) static_cast<Product*>(lanes[l])->d[r] += d[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
}

}  // namespace on_cpu

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, CUDA_ON_CPU_SITE) {
  on_cpu::load_matrices({"ldmatrix", file, line}, out, row, false);
}
inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row, CUDA_ON_CPU_SITE) {
  on_cpu::load_matrices({"ldmatrix.trans", file, line}, out, row, true);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CUDA_ON_CPU_SITE) {
  on_cpu::Product mine{d, a, {b0, b1}};
  cuda_on_cpu::warp_operation({"mma.sync", file, line}, 0xffffffffu, &mine, on_cpu::multiply<T>);
}

inline void cp_async16(void* shared, const void* global, bool inside) {
  cuda_on_cpu::async_copy(shared, global, inside ? 16 : 0);
}
inline void cp_async_commit() { cuda_on_cpu::async_commit(); }
template <int N> void cp_async_wait() { cuda_on_cpu::async_wait(N); }

}  // namespace pyfused
