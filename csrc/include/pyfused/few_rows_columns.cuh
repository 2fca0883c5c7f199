// How are up to 8 rows multiplied by a weight matrix that memory holds transposed, (K, N), like Hugging Face's Conv1D? For
// linear.cu and ffn.cu; decode_columns.cuh uses the same parts. Not yet measured.
//
// A lane reads 16 bytes of a row of memory: V neighbouring outputs for one value of K. LANES lanes lie side by side, so a warp
// reads pieces of LANES x 16 bytes of kWarp / LANES rows at once. A lane keeps the sums of its own outputs, V for each row of x.
// In the end the lanes that share outputs add theirs, then the warps of the block, both in a fixed order.
//
// Here a piece is 32 bytes, a whole sector: 768 outputs in 16 bits are 48 blocks of 16 warps, which have 1.6 MB under way, and
// their neighbours find the rest of a line in the L2. A 16-bit weight costs R FMAs and a conversion, as in few_rows.cuh: 55% of
// the FMA rate at 8 rows. Beyond, cuBLAS's tensor cores are faster.
#pragma once

#include "pyfused/few_rows.cuh"

namespace pyfused {

constexpr int kFewRowsByColumns = 8;

namespace {

// sum[row][j] += w[j] * x[row][0], for the rows of x, `stride` apart. Rows past the last repeat it and are dropped in the end.
template <int V, int ROWS, class T, class X, class Stride>
__device__ void add_columns(float* sum, const Pack<T, V>& w, const X* x, Stride stride, int rows) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float factor = widen(*x);
    if (r + 1 < rows) x += stride;
#pragma unroll
    for (int j = 0; j < V; ++j) sum[r * V + j] += widen(w.at[j]) * factor;
  }
}

// Adds the lanes' sums, [row][V], over the warp: LANES lanes side by side have outputs of their own. total: [row][LANES x V].
template <int V, int LANES, int ROWS> __device__ void store_columns(float* sum, float* total) {
  constexpr int COUNT = ROWS * V, SHARING = kWarp / LANES, KEPT = COUNT > SHARING ? COUNT / SHARING : 1;
  constexpr int SAME = COUNT < SHARING ? SHARING / COUNT : 1;  // lanes with the same sum
  const int lane = threadIdx.x % kWarp, share = lane / LANES;
  spread_sum<COUNT, LANES>(sum);
  if (share % SAME) return;
#pragma unroll
  for (int u = 0; u < KEPT; ++u) {
    const int i = share * COUNT / SHARING + u;
    total[i / V * (LANES * V) + lane % LANES * V + i % V] = sum[u];
  }
}

// V elements for a lane, AHEAD accesses under way before the first is used.
template <class T, int V, int LANES, int ROWS>
__global__ void __launch_bounds__(most_warps(ROWS) * kWarp, ROWS > 4 ? 2 : 1) columns_kernel(FewRows<T, T, T> a) {
  constexpr int AHEAD = 4, COLS = LANES * V, STEP = kWarp / LANES;
  __shared__ float sums[most_warps(ROWS) * ROWS * COLS];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = blockIdx.x * (blockDim.x / kWarp / a.splits) + warp / a.splits;
  const int first = group * COLS + lane % LANES * V, begin = warp % a.splits * a.share;
  const int end = first < a.n ? min(begin + a.share, a.k) : 0;
  float sum[ROWS * V] = {};
  for (int start = begin + lane / LANES; start < end; start += AHEAD * STEP) {
    Pack<T, V> w[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (const int at = start + i * STEP; at < end) w[i] = load_once<V>(a.weight + at * a.weight_stride + first);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (const int at = start + i * STEP; at < end) add_columns<V, ROWS>(sum, w[i], a.x + at, a.x_stride, a.rows);
  }
  store_columns<V, LANES, ROWS>(sum, sums + warp * ROWS * COLS);
  finish<ROWS, COLS, false>(a, sums);
}

// ---- launchers ------------------------------------------------------------------------------------------------------

template <int V, int LANES, int ROWS, class T> void columns_rows(const FewRows<T, T, T>& a, std::uintptr_t stream) {
  launch_few_rows(columns_kernel<T, V, LANES, ROWS>, a, LANES * V, kWarp / LANES, most_warps(ROWS), stream);
}

// As few_rows(), for rows <= kFewRowsByColumns and weight (k, n), weight_stride elements from row to row.
template <class T> void few_rows_by_columns(FewRows<T, T, T> a, std::uintptr_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (a.rows == 0 || a.n == 0) return;
  if (a.k == 1) a.weight_stride = 0;
  const bool wide = aligned16({(std::uintptr_t)a.weight}) && a.n % V == 0 && a.weight_stride % V == 0;
  if (!wide) return columns_rows<1, kWarp, 8>(a, stream);
  if (a.rows == 1) return columns_rows<V, 2, 1>(a, stream);
  if (a.rows <= 4) return columns_rows<V, 2, 4>(a, stream);
  columns_rows<V, 2, 8>(a, stream);
}

}  // namespace
}  // namespace pyfused
