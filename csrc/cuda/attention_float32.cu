// attention on CUDA in float32, many queries or few. It runs on the ordinary cores: TF32 would lose 13 bits of every factor.
//
// 4 B H Sq Sk D FLOPs at no more than 67 TFLOP/s on an H100: B4 H16 S2048 D64 has 69 GFLOP, 1.0 ms at that peak, 134
// MB or 45 us of memory. A fragment of 4 x 4 scores reads 8 vectors of shared memory for 64 multiply-adds. The reads
// take 12 of the 16 clocks: predicted 60% of the peak, 1.7 ms. With few rows memory is the limit, as in
// attention_decode.cu. Not yet measured.
//
// Tiling: 256 threads as 16 x 16. A thread has TR rows. In each row it computes every 16th key of a tile of scores and
// four of every 64 output columns. Keys arrive while the previous values are multiplied, and values while keys are, so
// each needs one buffer. Rows of query and key are padded by 16 bytes, so the vectors of eight neighbours hit all 32
// banks. Probabilities go through shared memory within the half warp that owns a row. Scores keep base e: folding log2(e)
// into the scale rounds a score and the maximum separately before they are subtracted, and float32 results show that.
#include "attention.cuh"

namespace pyfused::cuda {
namespace {

constexpr int kThreads = 256, kSide = 16, kPad = 4;
constexpr int kBlock = 32;  // a score adds up sums of so many products: one chain of 256 would lose a digit more

template <int D, int TR, int TN> constexpr size_t shared_floats() {
  return (TR + TN) * kSide * (D + kPad) + TN * kSide * D + TR * kSide * (TN * kSide + kPad);
}

// ---- kernel ---------------------------------------------------------------------------------------------------------
template <bool ALIGNED, int D, int ROWS>
__device__ void copy_rows(const Attention& a, const Keys& keys, const float* rows, int64_t stride, int start, int pitch,
                          float* tile) {
#pragma unroll 1  // the addresses of several rows at once would spill
  for (int i = threadIdx.x; i < ROWS * (D / 4); i += kThreads) {
    const int row = i / (D / 4), at = i % (D / 4) * 4;
    const bool live = is_live(keys, start + row);
    copy_chunk<ALIGNED>(tile + row * pitch + at, rows + (live ? start + row : 0) * stride, at, a.d, live);
  }
}

__device__ inline float side_max(float v) {
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, offset));
  return v;
}
__device__ inline float side_sum(float v) {
#pragma unroll
  for (int offset = kSide / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

template <int D, int TR, int TN, bool SEQUENCES, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, TR == 1 ? 2 : 1) float32_kernel(Attention a) {
  constexpr int kRows = TR * kSide, kKeys = TN * kSide, kPitch = D + kPad, kScores = kKeys + kPad, C = D / 64;
  PYFUSED_SHARED_BYTES(shared);
  __shared__ int scratch[3 * kThreads / kWarp];
  float *query_tile = (float*)shared, *key_tile = query_tile + kRows * kPitch;
  float *value_tile = key_tile + kKeys * kPitch, *scores = value_tile + kKeys * D;
  float* by_distance = scores + kRows * kScores;

  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  const Place place = place_of<SEQUENCES>(a, kRows);
  if constexpr (SEQUENCES)
    if (is_empty(place)) return;  // the whole block
  const Keys keys = keys_of<SEQUENCES>(a, place, kRows, scratch);
  fill_distances<float>(a, place, 1.0f, by_distance);
  const int key_head = place.set * a.pack / a.group;
  const float* key = (const float*)a.key + place.origin * a.key_stride[0] + key_head * a.key_stride[1];
  const float* value = (const float*)a.value + place.origin * a.value_stride[0] + key_head * a.value_stride[1];
  const int begin = keys.first / 16 * 16;

  for (int i = threadIdx.x; i < kRows * (D / 4); i += kThreads) {
    const int row = i / (D / 4), at = i % (D / 4) * 4;
    copy_chunk<ALIGNED>(query_tile + row * kPitch + at, query_row<float>(a, place, place.first + row), at, a.d, true);
  }
  copy_rows<ALIGNED, D, kKeys>(a, keys, key, a.key_stride[2], begin, kPitch, key_tile);
  cp_async_commit();

  int last[TR];
  Row row[TR];
#pragma unroll
  for (int r = 0; r < TR; ++r) {
    row[r] = row_at(a, place, place.first + ty * TR + r);
    last[r] = last_key(a, keys, row[r].query);
  }
  const bool wanted = place.first + (int)threadIdx.x / kWarp * 2 * TR < place.rows;  // whether any row of the warp is written
  const int64_t seed = a.seed ? *a.seed : 0;
  float acc[TR][C][4] = {}, row_max[TR], row_sum[TR] = {};
#pragma unroll
  for (int r = 0; r < TR; ++r) row_max[r] = kNever;

  for (int start = begin; start < keys.end; start += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // the keys have arrived, and no thread reads the previous values any more
    copy_rows<ALIGNED, D, kKeys>(a, keys, value, a.value_stride[2], start, D, value_tile);
    cp_async_commit();
    float alpha[TR];
    if (wanted) {
      float s[TR][TN] = {};
#pragma unroll 1
      for (int block = 0; block < D; block += kBlock) {
        float part[TR][TN] = {};
#pragma unroll 4
        for (int d = block; d < block + kBlock; d += 4) {
          Pack<float, 4> q[TR], k[TN];
#pragma unroll
          for (int r = 0; r < TR; ++r) q[r] = load<4>(query_tile + (ty * TR + r) * kPitch + d);
#pragma unroll
          for (int n = 0; n < TN; ++n) k[n] = load<4>(key_tile + (tx + n * kSide) * kPitch + d);
#pragma unroll
          for (int r = 0; r < TR; ++r)
#pragma unroll
            for (int n = 0; n < TN; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) part[r][n] = fmaf(q[r].at[i], k[n].at[i], part[r][n]);
        }
#pragma unroll
        for (int r = 0; r < TR; ++r)
#pragma unroll
          for (int n = 0; n < TN; ++n) s[r][n] += part[r][n];
      }
      bool live[TN];
#pragma unroll
      for (int n = 0; n < TN; ++n) live[n] = is_live(keys, start + tx + n * kSide);
#pragma unroll
      for (int r = 0; r < TR; ++r) {
        const float* bias = (const float*)a.bias + place.batch * a.bias_stride[0] + row[r].head * a.bias_stride[1] +
                            row[r].query * a.bias_stride[2];
        const float* relative = by_distance + (row[r].head - place.set * a.pack) * (2 * a.span + 1) + a.span;
        float high = row_max[r];
#pragma unroll
        for (int n = 0; n < TN; ++n) {
          const int at = start + tx + n * kSide;
          const bool seen = live[n] && at <= last[r];
          s[r][n] *= a.scale;
          if (!SEQUENCES && a.bias && seen) s[r][n] += bias[at * a.bias_stride[3]];
          if (a.table) {
            const int distance = at - (row[r].query + a.sk - a.sq);
            s[r][n] += relative[min(max(distance, -a.span), a.span)];
          }
          if (!seen) s[r][n] = kNever;
          high = fmaxf(high, s[r][n]);
        }
        high = side_max(high);
        const float shift = high == kNever ? 0.0f : high;  // nothing seen yet: exp(-inf - 0) is 0, not NaN
        alpha[r] = expf(row_max[r] - shift);
        row_max[r] = high;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < TN; ++n) {
          float p = expf(s[r][n] - shift);
          sum += p;
          if (a.seed) {
            const int at = start + tx + n * kSide;
            uint32_t words[4];
            philox(seed, (uint32_t)at / 4, row[r].query, place.batch * a.h + row[r].head, words);
            const uint32_t low = at & 1 ? words[1] : words[0], upper = at & 1 ? words[3] : words[2];
            if ((at & 2 ? upper : low) < a.threshold) p = 0.0f;
          }
          scores[(ty * TR + r) * kScores + tx + n * kSide] = p;
        }
        row_sum[r] = fmaf(row_sum[r], alpha[r], sum);
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // the values and probabilities have arrived, and no thread reads the keys any more
    if (start + kKeys < keys.end)
      copy_rows<ALIGNED, D, kKeys>(a, keys, key, a.key_stride[2], start + kKeys, kPitch, key_tile);
    cp_async_commit();
    if (wanted) {
      float part[TR][C][4] = {};
#pragma unroll 2
      for (int k = 0; k < kKeys; k += 4) {
        Pack<float, 4> p[TR];
#pragma unroll
        for (int r = 0; r < TR; ++r) p[r] = load<4>(scores + (ty * TR + r) * kScores + k);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int c = 0; c < C; ++c) {
            const Pack<float, 4> v = load<4>(value_tile + (k + j) * D + c * 64 + tx * 4);
#pragma unroll
            for (int r = 0; r < TR; ++r)
#pragma unroll
              for (int i = 0; i < 4; ++i) part[r][c][i] = fmaf(p[r].at[j], v.at[i], part[r][c][i]);
          }
      }
#pragma unroll
      for (int r = 0; r < TR; ++r)
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[r][c][i] = fmaf(acc[r][c][i], alpha[r], part[r][c][i]);
    }
  }
  cp_async_wait<0>();

  const int64_t rows = (int64_t)a.b * a.h * a.sq;
#pragma unroll
  for (int r = 0; r < TR; ++r) {
    const float sum = side_sum(row_sum[r]), factor = a.keep_scale / (sum == 0.0f ? 1.0f : sum);
    if (place.first + ty * TR + r >= place.rows) continue;
    float* out = (float*)a.out + blockIdx.y * a.chunk_stride + place.origin * a.out_stride[0] +
                 row[r].head * a.out_stride[1] + row[r].query * a.out_stride[2];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int at = c * 64 + tx * 4;
      Pack<float, 4> v;
#pragma unroll
      for (int i = 0; i < 4; ++i) v.at[i] = acc[r][c][i] * factor;
      if constexpr (ALIGNED) {
        if (at < a.d) store<4>(out + at, v);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (at + i < a.d) out[at + i] = v.at[i];
      }
    }
    if (a.lse && tx == 0)
      a.lse[blockIdx.y * rows + flat_row(a, place, row[r])] = sum == 0.0f ? INFINITY : row_max[r] + logf(sum);
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------
template <int D, int TR, int TN, bool SEQUENCES, bool ALIGNED = true>
void launch_float32(const Launch& launch, const Attention& a, addr stream) {
  const size_t bytes = (shared_floats<D, TR, TN>() + distances(a)) * sizeof(float);
  auto kernel = float32_kernel<D, TR, TN, SEQUENCES, ALIGNED>;
  allow_shared(launch, kernel, bytes);
  const dim3 grid(launch.blocks(tiles_of(a, TR * kSide) * (a.h / a.pack)), (unsigned)up(a.sk, a.chunk));
  PYFUSED_LAUNCH(kernel, grid, kThreads, bytes, stream, a);
}

template <bool SEQUENCES> void by_head_size(const Launch& launch, const Attention& a, addr stream) {
  const bool few = mean_rows(a) <= kSide;
  if (!a.aligned) {  // rare: one kernel for each head size
    if (a.d <= 64) launch_float32<64, 4, 4, SEQUENCES, false>(launch, a, stream);
    else if (a.d <= 128) launch_float32<128, 4, 2, SEQUENCES, false>(launch, a, stream);
    else launch_float32<256, 1, 2, SEQUENCES, false>(launch, a, stream);
  } else if (a.d <= 64 && few) launch_float32<64, 1, 4, SEQUENCES>(launch, a, stream);
  else if (a.d <= 64) launch_float32<64, 4, 4, SEQUENCES>(launch, a, stream);
  else if (a.d <= 128 && few) launch_float32<128, 1, 2, SEQUENCES>(launch, a, stream);
  else if (a.d <= 128) launch_float32<128, 4, 2, SEQUENCES>(launch, a, stream);
  else launch_float32<256, 1, 2, SEQUENCES>(launch, a, stream);
}

}  // namespace

void attention_float32(const Launch& launch, const AttentionPointers& p, bool packed, int64_t chunk, addr stream) {
  const Attention a = arguments(p, packed, chunk, 4);
  if (a.cu_seqlens) by_head_size<true>(launch, a, stream);
  else by_head_size<false>(launch, a, stream);
}

}  // namespace pyfused::cuda
