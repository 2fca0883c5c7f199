// How do a block's results leave the registers? One warp stores its normalised rows, or several warps merge their rows.
#pragma once

#include "attention.cuh"

namespace pyfused::cuda {
namespace {

// A row's natural log-sum-exp from its base-2 maximum and sum; +inf if the row saw no key.
__device__ inline float natural_lse(float high, float sum) {
  return sum == 0.0f ? INFINITY : (high + log2f(sum)) * kLn2;
}

// Stores a warp's normalised rows. They go through the warp's own rows of the query tile, so each store has 16 bytes.
template <bool ALIGNED, class T, int D, int MR>
__device__ void write_tile(const Attention& a, const Place& place, T* tile, int warp_row,
                           const float (&acc)[MR][D / 8][4], const float (&row_max)[MR][2],
                           const float (&row_sum)[MR][2]) {
  const int lane = threadIdx.x % kWarp;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < MR; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * 16 + half * 8 + lane / 4;
      const float sum = row_sum[m][half], factor = a.keep_scale / (sum == 0.0f ? 1.0f : sum);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        Pack<T, 2> pair;
        pair.at[0] = narrow<T>(acc[m][n][2 * half] * factor), pair.at[1] = narrow<T>(acc[m][n][2 * half + 1] * factor);
        store<2>(tile + swizzled<D>(row, n) + lane % 4 * 2, pair);
      }
      if (a.lse && lane % 4 == 0 && place.first + row < place.rows)
        a.lse[flat_row(a, place, row_at(a, place, place.first + row))] = natural_lse(row_max[m][half], sum);
    }
  __syncwarp();
  for (int i = lane; i < MR * 16 * (D / 8); i += kWarp) {
    const int row = warp_row + i / (D / 8), at = i % (D / 8) * 8;
    if (place.first + row >= place.rows || at >= a.d) continue;
    const Row r = row_at(a, place, place.first + row);
    const Pack<T, 8> v = load<8>(tile + swizzled<D>(row, at / 8));
    T* to = (T*)a.out + place.origin * a.out_stride[0] + r.head * a.out_stride[1] + r.query * a.out_stride[2] + at;
    if constexpr (ALIGNED) {
      store<8>(to, v);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (at + j < a.d) to[j] = v.at[j];
    }
  }
}

// The bytes of shared memory that merge_warps uses in place of the tiles.
template <int WN, int D> constexpr int merge_bytes() { return WN * 16 * (D + 2) * 4; }

// Adds the results of WN warps for the same 16 rows in a fixed order. If the keys are split, it stores a float32 part.
template <class T, int D, int WN>
__device__ void merge_warps(const Attention& a, const Place& place, float* shared, const float (&acc)[D / 8][4],
                            const float (&row_max)[2], const float (&row_sum)[2]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float *high = shared + WN * 16 * D, *sum = high + WN * 16;
  __syncthreads();  // no thread reads the tiles any more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + lane / 4;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      Pack<float, 2> pair;
      pair.at[0] = acc[n][2 * half], pair.at[1] = acc[n][2 * half + 1];
      store<2>(shared + row * D + n * 8 + lane % 4 * 2, pair);
    }
    if (lane % 4 == 0) high[row] = row_max[half], sum[row] = row_sum[half];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < place.rows * D; i += WN * kWarp) {
    const int row = i / D, at = i % D;
    if (at >= a.d) continue;
    float peak = kNever, total = 0, out = 0;
#pragma unroll
    for (int w = 0; w < WN; ++w) peak = fmaxf(peak, high[w * 16 + row]);
    if (peak == kNever) peak = 0;
#pragma unroll
    for (int w = 0; w < WN; ++w) {
      const float weight = fast_exp2(high[w * 16 + row] - peak);
      total += sum[w * 16 + row] * weight;
      out += shared[(w * 16 + row) * D + at] * weight;
    }
    out *= a.keep_scale / (total == 0.0f ? 1.0f : total);
    const Row r = row_at(a, place, row);
    const int64_t to = place.origin * a.out_stride[0] + r.head * a.out_stride[1] + r.query * a.out_stride[2] + at;
    if (a.chunk_stride) ((float*)a.out)[blockIdx.y * a.chunk_stride + to] = out;
    else ((T*)a.out)[to] = narrow<T>(out);
    if (a.lse && at == 0)
      a.lse[(int64_t)blockIdx.y * a.b * a.h * a.sq + flat_row(a, place, r)] = natural_lse(peak, total);
  }
}

}  // namespace
}  // namespace pyfused::cuda
