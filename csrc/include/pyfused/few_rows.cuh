// How are up to 16 rows multiplied by a weight matrix at memory speed? y = activation(x W^T + bias) + residual, and the
// gated activation(x W^T) * (x U^T), for linear.cu and gated_ffn.cu, which were measured; x (R, K), W and U (N, K).
//
// Every weight is read once, 16 bytes a lane, past the L1. 3 TB/s at 700 ns need 2 MB under way, 16 KB on each of 132
// multiprocessors, so a warp requests 2 to 4 KB before it uses the first. All warps of a block find x in the L1.
// `splits` warps of a block share the sums of the same features. Each takes a stretch of K, and they add up in shared
// memory in a fixed order. So few features fill the chip too, and the result is bitwise repeatable.
//
// One or two rows run on the CUDA cores. A warp owns 4 columns (4 features; gated: a gate and an up column for each of
// 2 features). A lane widens an element of x once for all 4. A 16-bit weight costs R FMAs and a conversion. At 3 TB/s,
// 1.5 T weights/s, that is 18% of the FMA rate (28.7 T/s) at 2 rows, 31% at 4, but over 85% at 16.
// So 3 to 16 rows of 16 bits go to the tensor cores: x is mma's a (16 rows), W is its b (8 columns), and a warp has 8,
// 16 or 32 columns. A product may take K in any order, so a lane reads 8 neighbours in K of W and x with one access and
// uses them in two products: no shared memory, no ldmatrix. This takes 5% of the tensor cores' rate.
// float32 stays on the CUDA cores even with 16 rows: 0.75 T weights/s times 16 are 42% of the FMA rate.
#pragma once

#include "pyfused/activation.cuh"
#include "pyfused/launch.h"
#include "pyfused/tensor_core.cuh"

namespace pyfused {

constexpr int kFewRows = 16;
constexpr int kTensorWarps = 16;  // most warps of a block on the tensor cores
constexpr int kColumns = 4;       // columns of a warp on the CUDA cores
constexpr int kWindow = 32;       // values of K that a warp reads with one access on the tensor cores
constexpr int kWarpsWanted = 132 * 16;  // a constant, so that the splits depend on the shape alone

// The most warps of a block. 16 leave a thread 128 registers; the sums of 5 to 16 rows on CUDA cores need more.
constexpr int most_warps(int rows) { return rows > 4 ? 8 : 16; }
// Two such blocks on a multiprocessor unless their registers would spill: with 16 rows of float x and half weights.
template <class T, class X> constexpr int blocks_wanted(int rows) {
  return rows > 4 && (rows < 16 || sizeof(T) == sizeof(X)) ? 2 : 1;
}

// X is the type of x, Y of the result. X is float beside half weights if x is gated_ffn's hidden row, which may exceed fp16.
template <class T, class X, class Y> struct FewRows {
  const X* x;
  const T *weight, *up, *bias, *residual;  // up: gated only; bias and residual may be null
  Y* y;
  T *pre, *pre_up;  // the activation's argument and up's column, kept for a backward; or null
  int rows, n, k, activation;
  int64_t x_stride, weight_stride, up_stride, residual_stride;
  int splits, share;  // warps that share a column's sum, and each one's stretch of K; set by few_rows()
};

// ---- kernels --------------------------------------------------------------------------------------------------------
namespace {

// A weight is read once, so it bypasses the L1 and the L2 fetches the whole line.
template <int V, class T> __device__ Pack<T, V> load_once(const T* p) {
#ifndef PYFUSED_CUDA_ON_CPU
  if constexpr (V * sizeof(T) == 16) {
    uint32_t word[4];
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "l"(p));
    Pack<T, V> out;
    memcpy(&out, word, 16);
    return out;
  }
#endif
  return load<V>(p);
}

// Sums each of COUNT values (a power of two) over the lanes with equal l % LAST, by default over the warp. With COUNT at most
// kWarp / LAST, lane l gets the sum of v[l / LAST * COUNT / (kWarp / LAST)]; with more it gets the values from there on, in v.
// Each step halves the values a lane holds: COUNT - 1 shuffles and a few, instead of 5 COUNT. Overwrites v.
template <int COUNT, int LAST = 1, int OFFSET = kWarp / 2> __device__ float spread_sum(float* v) {
  if constexpr (OFFSET < LAST) {
    return v[0];
  } else if constexpr (COUNT > 1) {
    const bool upper = threadIdx.x & OFFSET;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      const float keep = upper ? v[i + COUNT / 2] : v[i], send = upper ? v[i] : v[i + COUNT / 2];
      v[i] = keep + __shfl_xor_sync(kAllLanes, send, OFFSET);
    }
    return spread_sum<COUNT / 2, LAST, OFFSET / 2>(v);
  } else {
    v[0] += __shfl_xor_sync(kAllLanes, v[0], OFFSET);
    return spread_sum<1, LAST, OFFSET / 2>(v);
  }
}

// The row of W or U for a warp's column. Columns past the last feature repeat it and are dropped in the end.
template <int COLS, bool GATED, class A> __device__ auto weight_row(const A& a, int first, int column) {
  constexpr int FEATURES = GATED ? COLS / 2 : COLS;
  const int feature = min(first + column % FEATURES, a.n - 1);
  return GATED && column >= FEATURES ? a.up + feature * a.up_stride : a.weight + feature * a.weight_stride;
}

// Adds the splits of every sum of the block in order, and writes the results. sums: [warp][row][column].
template <int ROWS, int COLS, bool GATED, class T, class X, class Y>
__device__ void finish(const FewRows<T, X, Y>& a, const float* sums) {
  constexpr int FEATURES = GATED ? COLS / 2 : COLS;
  const int width = blockDim.x / kWarp / a.splits * FEATURES;  // features of the block
  __syncthreads();
  for (int i = threadIdx.x; i < a.rows * width; i += blockDim.x) {
    const int row = i / width, at = i % width, feature = blockIdx.x * width + at;
    if (feature >= a.n) continue;
    const float* sum = sums + (at / FEATURES * a.splits * ROWS + row) * COLS + at % FEATURES;
    float value = 0, up = 0;
    for (int part = 0; part < a.splits; ++part, sum += ROWS * COLS) {
      value += sum[0];
      if (GATED) up += sum[FEATURES];
    }
    const int64_t here = (int64_t)row * a.n + feature;
    if (a.bias) value += widen(a.bias[feature]);
    if (a.pre) a.pre[here] = narrow<T>(value);
    value = activate(a.activation, value);
    if (GATED) {
      if (a.pre_up) a.pre_up[here] = narrow<T>(up);
      value *= up;
    }
    if (a.residual) value += widen(a.residual[row * a.residual_stride + feature]);
    a.y[here] = narrow<Y>(value);
  }
}

// Runs on the CUDA cores. AHEAD accesses to each column are under way before the first is used.
template <class T, class X, class Y, int V, int ROWS, bool GATED>
__global__ void __launch_bounds__(most_warps(ROWS) * kWarp, blocks_wanted<T, X>(ROWS))
    stream_kernel(FewRows<T, X, Y> a) {
  constexpr int AHEAD = ROWS <= 4 ? 2 : 1, SUMS = ROWS * kColumns;
  constexpr int X_V = V * sizeof(X) > 16 ? 16 / sizeof(X) : V;  // elements of one access to x
  __shared__ float sums[most_warps(ROWS) * SUMS];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = blockIdx.x * (blockDim.x / kWarp / a.splits) + warp / a.splits;
  const int first = group * (GATED ? kColumns / 2 : kColumns), begin = warp % a.splits * a.share;
  const int end = min(begin + a.share, a.k);
  const T* weight[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) weight[c] = weight_row<kColumns, GATED>(a, first, c);
  float sum[SUMS] = {};
  for (int start = begin + lane * V; start < end; start += AHEAD * kWarp * V) {
    Pack<T, V> w[AHEAD][kColumns];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (const int at = start + i * kWarp * V; at < end)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) w[i][c] = load_once<V>(weight[c] + at);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (const int at = start + i * kWarp * V; at < end)
#pragma unroll
        for (int half = 0; half < V; half += X_V) {
          const X* row = a.x + at + half;  // one moving pointer: sixteen addresses would fill 32 registers
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            const Pack<X, X_V> x = load<X_V>(row);
            if (r + 1 < a.rows) row += a.x_stride;  // rows past the last repeat it and are dropped in the end
#pragma unroll
            for (int j = 0; j < X_V; ++j)
#pragma unroll
              for (int c = 0; c < kColumns; ++c) sum[r * kColumns + c] += widen(w[i][c].at[half + j]) * widen(x.at[j]);
          }
        }
  }
  constexpr int TOGETHER = SUMS < kWarp ? SUMS : kWarp;
#pragma unroll
  for (int i = 0; i < SUMS; i += TOGETHER) {
    const float total = spread_sum<TOGETHER>(sum + i);
    if (lane % (kWarp / TOGETHER) == 0) sums[warp * SUMS + i + lane / (kWarp / TOGETHER)] = total;
  }
  finish<ROWS, kColumns, GATED>(a, sums);
}

// Runs on the tensor cores, with TILES tiles of 8 columns per warp. Lane l = 4 g + t holds values 8 t to 8 t + 7 of a
// window of K, for x's rows g and g + 8 and for column g. Pairs 0 and 1 go into one product, pairs 2 and 3 into another.
template <class T, class Y, int TILES, bool TALL, bool GATED>
__global__ void __launch_bounds__(kTensorWarps* kWarp) tensor_kernel(FewRows<T, T, Y> a) {
  constexpr int V = 8, COLS = TILES * 8, ROWS = TALL ? 16 : 8, AHEAD = TILES == 4 ? 2 : 4;
  __shared__ float sums[kTensorWarps * ROWS * COLS];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int group = blockIdx.x * (blockDim.x / kWarp / a.splits) + warp / a.splits;
  const int first = group * (GATED ? COLS / 2 : COLS), begin = warp % a.splits * a.share;
  const int end = min(begin + a.share, a.k);
  const T* weight[TILES];
#pragma unroll
  for (int i = 0; i < TILES; ++i) weight[i] = weight_row<COLS, GATED>(a, first, i * 8 + g);
  const T *low = a.x + min(g, a.rows - 1) * a.x_stride, *high = a.x + min(g + 8, a.rows - 1) * a.x_stride;
  float d[TILES][4] = {};
  for (int start = begin; start < end; start += AHEAD * kWindow) {  // the same for the whole warp, as mma needs it
    Pack<T, V> w[AHEAD][TILES], x[AHEAD], x8[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int at = start + i * kWindow + t * V;
      x[i] = x8[i] = Pack<T, V>{};
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        w[i][tile] = at < end ? load_once<V>(weight[tile] + at) : Pack<T, V>{};
      if (at < end) {
        x[i] = load<V>(low + at);
        if (TALL) x8[i] = load<V>(high + at);
      }
    }
    __syncwarp();  // otherwise the compiler moves some loads behind the first products, and those wait for the others
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      uint32_t p[4], q[4];
      memcpy(p, &x[i], 16), memcpy(q, &x8[i], 16);
      const uint32_t near[4] = {p[0], q[0], p[1], q[1]}, far[4] = {p[2], q[2], p[3], q[3]};
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        uint32_t b[4];
        memcpy(b, &w[i][tile], 16);
        mma_m16n8k16<T>(d[tile], near, b[0], b[1]);
        mma_m16n8k16<T>(d[tile], far, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    float* sum = sums + (warp * ROWS + g) * COLS + tile * 8 + t * 2;
    sum[0] = d[tile][0], sum[1] = d[tile][1];
    if (TALL) sum[8 * COLS] = d[tile][2], sum[8 * COLS + 1] = d[tile][3];
  }
  finish<ROWS, COLS, GATED>(a, sums);
}

// ---- launchers ------------------------------------------------------------------------------------------------------
// Launches. While the chip is not full, K is split in pieces of `step` over the warps of a block.
template <class Kernel, class A>
void launch_few_rows(Kernel* kernel, A a, int64_t features, int64_t step, int most, std::uintptr_t stream) {
  const int64_t groups = up(a.n, features), pieces = up(a.k, step);
  a.splits = 1;
  while (a.splits < most && a.splits < pieces && groups * a.splits < kWarpsWanted) a.splits *= 2;
  a.share = (int)(up(pieces, a.splits) * step);
  const int warps = a.splits > 8 ? a.splits : 8;
  PYFUSED_LAUNCH(kernel, (unsigned)up(groups, warps / a.splits), warps * kWarp, 0, stream, a);
}

template <int V, int ROWS, bool GATED, class T, class X, class Y>
void stream_rows(const FewRows<T, X, Y>& a, std::uintptr_t stream) {
  const int features = GATED ? kColumns / 2 : kColumns;
  launch_few_rows(stream_kernel<T, X, Y, V, ROWS, GATED>, a, features, kWarp * V, most_warps(ROWS), stream);
}

template <int TILES, bool GATED, class T, class Y>
void tensor_rows(const FewRows<T, T, Y>& a, std::uintptr_t stream) {
  const int features = GATED ? TILES * 4 : TILES * 8;
  auto kernel = a.rows > 8 ? tensor_kernel<T, Y, TILES, true, GATED> : tensor_kernel<T, Y, TILES, false, GATED>;
  launch_few_rows(kernel, a, features, kWindow, kTensorWarps, stream);
}

// Wide tiles read x less often. Narrow tiles give every multiprocessor a tile.
template <bool GATED, class T, class Y> void tensor_tiles(const FewRows<T, T, Y>& a, std::uintptr_t stream) {
  const int64_t columns = (GATED ? 2 : 1) * (int64_t)a.n;
  if (columns >= 32 * 2 * 132) return tensor_rows<4, GATED>(a, stream);
  if constexpr (!GATED)
    if (columns < 16 * 132) return tensor_rows<1, GATED>(a, stream);
  tensor_rows<2, GATED>(a, stream);
}

// rows <= kFewRows; splits and share need not be set.
template <bool GATED, class T, class X, class Y> void few_rows(FewRows<T, X, Y> a, std::uintptr_t stream) {
  constexpr int V = 16 / sizeof(T);
  constexpr bool tensor = sizeof(T) == 2 && sizeof(X) == 2;
  if (a.rows == 0 || a.n == 0) return;
  if (a.rows == 1) a.x_stride = 0;
  if (a.n == 1) a.weight_stride = a.up_stride = 0;
  const bool wide = aligned16({(std::uintptr_t)a.x, (std::uintptr_t)a.weight, (std::uintptr_t)a.up}) && a.k % V == 0 &&
                    a.x_stride % V == 0 && a.weight_stride % V == 0 && a.up_stride % V == 0;
  if (!wide) {
    if (a.rows == 1) return stream_rows<1, 1, GATED>(a, stream);
    if (a.rows <= 4) return stream_rows<1, 4, GATED>(a, stream);
    return stream_rows<1, 16, GATED>(a, stream);
  }
  if (a.rows == 1) return stream_rows<V, 1, GATED>(a, stream);
  if (a.rows == 2) return stream_rows<V, 2, GATED>(a, stream);
  if constexpr (tensor) return tensor_tiles<GATED>(a, stream);
  else if (a.rows <= 4) return stream_rows<V, 4, GATED>(a, stream);
  else if (a.rows <= 8) return stream_rows<V, 8, GATED>(a, stream);
  else return stream_rows<V, 16, GATED>(a, stream);
}

}  // namespace
}  // namespace pyfused
