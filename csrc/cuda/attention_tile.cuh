// How does a block compute attention on the tensor cores? With an online softmax over tiles of keys (FlashAttention-2).
//
// WM x WN warps: a warp has MR * 16 rows and one WN-th of each tile of BN keys. Prefill has WN = 1, so a tile of K and V
// serves WM * MR * 16 rows. Decode has WM = 1, because it has only one tile of 16 rows; its warps' sums are added in order
// at the end. K and V come through a ring of STAGES tiles (cp.async) with one barrier per tile. Scores, probabilities and
// the running output stay in registers: mma writes scores in the same fragment layout in which it reads probabilities.
// Scores are base-2 logarithms, so an exponential is one instruction.
#pragma once

#include "attention_output.cuh"

namespace pyfused::cuda {
namespace {

template <int MR, int WM, int BN, int STAGES, int D> constexpr int tile_bytes() {
  return (WM * MR * 16 + 2 * STAGES * BN) * D * 2;
}

// The maximum, and below the sum, over the four lanes that share a row of a fragment.
__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
  return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}
__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}

// A warp's fragment of 16 query rows for columns 16 * k of the tile.
template <class T, int D> __device__ inline void query_fragment(uint32_t (&q)[4], const T* tile, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_x4(q, tile + swizzled<D>(row + lane % 16, 2 * k + lane / 16));
}

template <bool ALIGNED, class T, int D, int BN, int THREADS>
__device__ void copy_keys(const Attention& a, const Keys& keys, const T* key, const T* value, int start, T* key_tile,
                          T* value_tile) {
  constexpr int kChunks = D / 8, kEach = BN * kChunks / THREADS;
  static_assert(BN * kChunks % THREADS == 0, "every thread copies equally much");
#pragma unroll(D > 128 ? 2 : kEach)  // addresses take registers, and long heads have none to spare
  for (int i = 0; i < kEach; ++i) {
    int row, chunk;
    if constexpr (THREADS % kChunks == 0) {  // a thread stays in its column
      row = threadIdx.x / kChunks + i * (THREADS / kChunks), chunk = threadIdx.x % kChunks;
    } else {
      row = (threadIdx.x + i * THREADS) / kChunks, chunk = (threadIdx.x + i * THREADS) % kChunks;
    }
    const bool live = is_live(keys, start + row);
    const int64_t at = live ? start + row : 0;
    const int to = swizzled<D>(row, chunk);
    copy_chunk<ALIGNED>(key_tile + to, key + at * a.key_stride[2], chunk * 8, a.d, live);
    copy_chunk<ALIGNED>(value_tile + to, value + at * a.value_stride[2], chunk * 8, a.d, live);
  }
}

// Writes zeros where the generator drops. A lane's pair of keys is half of a quad. So of two neighbours the even lane
// draws for the upper row and the odd lane for the lower row, and they swap halves.
template <int NT>
__device__ inline void drop(float (&s)[NT][4], int64_t seed, int start, const int (&query)[2], const int (&head)[2],
                            uint32_t threshold) {
  const int lane = threadIdx.x % kWarp, odd = lane & 1;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    uint32_t w[4];
    philox(seed, (uint32_t)(start + n * 8) / 4 + lane % 4 / 2, odd ? query[1] : query[0], odd ? head[1] : head[0], w);
    const uint32_t other0 = __shfl_xor_sync(kAllLanes, odd ? w[0] : w[2], 1);
    const uint32_t other1 = __shfl_xor_sync(kAllLanes, odd ? w[1] : w[3], 1);
    s[n][0] = (odd ? other0 : w[0]) >= threshold ? s[n][0] : 0.0f;
    s[n][1] = (odd ? other1 : w[1]) >= threshold ? s[n][1] : 0.0f;
    s[n][2] = (odd ? w[2] : other0) >= threshold ? s[n][2] : 0.0f;
    s[n][3] = (odd ? w[3] : other1) >= threshold ? s[n][3] : 0.0f;
  }
}

// The bias of a lane's pairs of keys in one row. Keys from `end` on are not read.
template <class T, int NT>
__device__ inline void load_bias(Pack<T, 2> (&bias)[NT], const T* row, const Attention& a, int start, int end) {
  const int first = start + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int key = first + n * 8;
    bias[n].at[0] = bias[n].at[1] = narrow<T>(0.0f);
    if (a.bias_pairs) {
      if (key < end) bias[n] = load<2>(row + key);
    } else {
      if (key < end) bias[n].at[0] = row[key * a.bias_stride[3]];
      if (key + 1 < end) bias[n].at[1] = row[(key + 1) * a.bias_stride[3]];
    }
  }
}

// Adds T5's bias to a row's scores. In by_distance `shift` is the index of key 0, `base` the index of the head's start. If
// all keys are farther away than span, they share one value, as in most tiles of a long sequence.
template <int NT>
__device__ inline void add_distances(float (&s)[NT][4], int half, const float* by_distance, int start, int base,
                                     int shift, int span, int far) {
  const int first = start + threadIdx.x % 4 * 2 + shift;
  const float same = by_distance[base + (far > 0 ? 2 * span : 0)];
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = min(max(first + n * 8 + i, base), base + 2 * span);
      s[n][2 * half + i] += far ? same : by_distance[at];
    }
}

// A kernel's additions to the scores. kNone: nothing, and a positive scale, so the maximum may be taken before scaling, and
// scaling is part of a multiply-add. kRelative: T5's bias. kAny: also a dense bias, dropout and any scale. SEQUENCES:
// packed sequences have their own kernels, because the compiler does not see that a block's place is then uniform; that
// costs registers. ALIGNED: every row begins at a multiple of 16 bytes. Other calls are rare, and all of them run as kAny.
enum class Extras { kNone, kRelative, kAny };

template <class T, int D, int MR, int WM, int WN, int BN, int STAGES, Extras EXTRAS, bool SEQUENCES, bool ALIGNED>
__global__ void __launch_bounds__(WM* WN* kWarp) attention_kernel(Attention a) {
  constexpr bool kNone = EXTRAS == Extras::kNone, kAny = EXTRAS == Extras::kAny, kDense = kAny && !SEQUENCES;
  constexpr int kThreads = WM * WN * kWarp, kRows = WM * MR * 16, kOwn = BN / WN, NT = kOwn / 8, K = D / 16;
  constexpr bool kHoldQuery = MR * D <= (kNone ? 128 : 64);  // in registers; else read from shared memory for each tile
  PYFUSED_SHARED_BYTES(shared);
  __shared__ int scratch[3 * WM * WN];
  float* by_distance = (float*)(shared + tile_bytes<MR, WM, BN, STAGES, D>());
  T *query_tile = (T*)shared, *key_tiles = query_tile + kRows * D, *value_tiles = key_tiles + STAGES * BN * D;

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, wm = warp / WN, wn = warp % WN;
  const Place place = place_of<SEQUENCES>(a, kRows);
  if constexpr (SEQUENCES)
    if (is_empty(place)) return;  // the whole block
  const int warp_row = wm * MR * 16;
  for (int i = threadIdx.x; i < kRows * (D / 8); i += kThreads) {
    const int row = i / (D / 8), chunk = i % (D / 8);
    copy_chunk<ALIGNED>(query_tile + swizzled<D>(row, chunk), query_row<T>(a, place, place.first + row), chunk * 8, a.d,
                        true);
  }
  cp_async_commit();
  if constexpr (!kNone) fill_distances<T>(a, place, kLog2e, by_distance);
  const Keys keys = keys_of<SEQUENCES>(a, place, kRows, scratch);
  const int begin = keys.first / 16 * 16, tiles = keys.end > begin ? (keys.end - begin + BN - 1) / BN : 0;
  const int key_head = place.set * a.pack / a.group;
  const T* key = (const T*)a.key + place.origin * a.key_stride[0] + key_head * a.key_stride[1];
  const T* value = (const T*)a.value + place.origin * a.value_stride[0] + key_head * a.value_stride[1];
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < tiles)
      copy_keys<ALIGNED, T, D, BN, kThreads>(a, keys, key, value, begin + i * BN, key_tiles + i * BN * D,
                                             value_tiles + i * BN * D);
    cp_async_commit();
  }

  int last[MR][2], query[MR][2], head[MR][2];
  int base[MR][2], shift[MR][2];  // each row's indices in by_distance
  const T* bias[MR][2];
#pragma unroll
  for (int m = 0; m < MR; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Row row = row_at(a, place, place.first + warp_row + m * 16 + half * 8 + lane / 4);
      last[m][half] = last_key(a, keys, row.query);
      if constexpr (!kNone) {
        base[m][half] = WN == 1 ? 0 : (row.head - place.set * a.pack) * (2 * a.span + 1);
        shift[m][half] = base[m][half] + a.span - (row.query + a.sk - a.sq);
      }
      if constexpr (kAny) {
        query[m][half] = row.query, head[m][half] = place.batch * a.h + row.head;
        bias[m][half] = (const T*)a.bias + place.batch * a.bias_stride[0] + row.head * a.bias_stride[1] +
                        row.query * a.bias_stride[2];
      }
    }
  // All rows of the warp see the keys up to warp_all. No row sees a key beyond warp_last.
  int warp_all = last_key(a, keys, a.pack == 1 ? place.first + warp_row : 0), warp_last = keys.end - 1;
  if (a.causal && a.pack == 1) warp_last = last_key(a, keys, place.first + warp_row + MR * 16 - 1);
  if (place.first + warp_row >= place.rows) warp_last = -1;  // no row of the warp is written
  const int nearest = a.sk - a.sq + (a.pack == 1 ? place.first + warp_row : 0);  // positions of the warp's queries
  const int farthest = a.pack == 1 ? nearest + MR * 16 - 1 : a.sk - 1;
  const int64_t seed = kAny && a.seed ? *a.seed : 0;
  const float scale = a.scale * kLog2e;

  uint32_t held[MR][kHoldQuery ? K : 1][4];
  cp_async_wait<STAGES - 1>();
  __syncthreads();
  if constexpr (kHoldQuery)
#pragma unroll
    for (int m = 0; m < MR; ++m)
#pragma unroll
      for (int k = 0; k < K; ++k) query_fragment<T, D>(held[m][k], query_tile, warp_row + m * 16, k);

  float acc[MR][D / 8][4] = {}, row_max[MR][2], row_sum[MR][2] = {};
#pragma unroll
  for (int m = 0; m < MR; ++m) row_max[m][0] = row_max[m][1] = kNever;

  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // the tile has arrived, and all threads are done with the previous tile, whose place is filled next
    if (tile + STAGES - 1 < tiles) {
      const int stage = (tile + STAGES - 1) % STAGES;
      copy_keys<ALIGNED, T, D, BN, kThreads>(a, keys, key, value, begin + (tile + STAGES - 1) * BN,
                                             key_tiles + stage * BN * D, value_tiles + stage * BN * D);
    }
    cp_async_commit();
    const int start = begin + tile * BN + wn * kOwn;
    if (start > warp_last) continue;
    uint32_t real[(kOwn + 31) / 32];
    if (keys.mask) {
      uint32_t any = 0;
#pragma unroll
      for (int i = 0; i < kOwn; i += 32) {
        real[i / 32] = __ballot_sync(kAllLanes, lane < kOwn && is_live(keys, start + i + lane));
        any |= real[i / 32];
      }
      if (!any) continue;
    }
    const bool masked = keys.mask || start < keys.first || start + kOwn - 1 > warp_all;
    const T* key_tile = key_tiles + tile % STAGES * BN * D;
    const T* value_tile = value_tiles + tile % STAGES * BN * D;

    Pack<T, 2> added[kDense ? MR : 1][2][NT];
    if constexpr (kDense)
      if (a.bias)
#pragma unroll
        for (int m = 0; m < MR; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) load_bias<T, NT>(added[m][half], bias[m][half], a, start, keys.end);

    float s[MR][NT][4] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      uint32_t q[MR][4];
#pragma unroll
      for (int m = 0; m < MR; ++m) {
        if constexpr (kHoldQuery) {
#pragma unroll
          for (int i = 0; i < 4; ++i) q[m][i] = held[m][k][i];
        } else {
          query_fragment<T, D>(q[m], query_tile, warp_row + m * 16, k);
        }
      }
#pragma unroll
      for (int n = 0; n < NT; n += 2) {
        uint32_t b[4];
        const int row = wn * kOwn + n * 8 + lane / 16 * 8 + lane % 8;
        ldmatrix_x4(b, key_tile + swizzled<D>(row, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < MR; ++m) {
          mma_m16n8k16<T>(s[m][n], q[m], b[0], b[1]);
          mma_m16n8k16<T>(s[m][n + 1], q[m], b[2], b[3]);
        }
      }
    }

#pragma unroll
    for (int m = 0; m < MR; ++m) {
      if constexpr (!kNone) {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[m][n][i] *= scale;
            if constexpr (kDense)
              if (a.bias) s[m][n][i] += widen(added[m][i / 2][n].at[i % 2]) * kLog2e;
          }
        if (!kAny || a.table) {
          const int far = start - farthest >= a.span ? 1 : nearest - (start + kOwn - 1) >= a.span ? -1 : 0;
#pragma unroll
          for (int half = 0; half < 2; ++half)
            add_distances<NT>(s[m], half, by_distance, start, base[m][half], shift[m][half], a.span, far);
        }
      }
      if (masked) {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = n * 8 + lane % 4 * 2 + i % 2;
            bool seen = start + at >= keys.first && start + at <= last[m][i / 2];
            if (keys.mask) seen = seen && (real[n / 4] >> at % 32 & 1);
            s[m][n][i] = seen ? s[m][n][i] : kNever;
          }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float peak = kNever;
#pragma unroll
        for (int n = 0; n < NT; ++n) peak = fmaxf(peak, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        peak = quad_max(peak);
        const float high = fmaxf(row_max[m][half], kNone ? peak * scale : peak);
        const float zero = high == kNever ? 0.0f : high;  // nothing seen yet: 2^(-inf - 0) is 0, not NaN
        const float alpha = fast_exp2(row_max[m][half] - zero);
        row_max[m][half] = high;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = fast_exp2(kNone ? s[m][n][i] * scale - zero : s[m][n][i] - zero);
            sum += s[m][n][i];
          }
        row_sum[m][half] = row_sum[m][half] * alpha + sum;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) acc[m][n][2 * half] *= alpha, acc[m][n][2 * half + 1] *= alpha;
      }
      if constexpr (kAny)
        if (a.seed) drop<NT>(s[m], seed, start, query[m], head[m], a.threshold);
    }

#pragma unroll
    for (int k = 0; k < kOwn / 16; ++k) {
      uint32_t p[MR][4];
#pragma unroll
      for (int m = 0; m < MR; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          p[m][i] = pack2<T>(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        const int row = wn * kOwn + k * 16 + lane % 16;
        ldmatrix_x4_trans(b, value_tile + swizzled<D>(row, n + lane / 16));
#pragma unroll
        for (int m = 0; m < MR; ++m) {
          mma_m16n8k16<T>(acc[m][n], p[m], b[0], b[1]);
          mma_m16n8k16<T>(acc[m][n + 1], p[m], b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int m = 0; m < MR; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) row_sum[m][half] = quad_sum(row_sum[m][half]);

  if constexpr (WN == 1) write_tile<ALIGNED, T, D, MR>(a, place, query_tile, warp_row, acc, row_max, row_sum);
  else merge_warps<T, D, WN>(a, place, (float*)shared, acc[0], row_max[0], row_sum[0]);
}

}  // namespace
}  // namespace pyfused::cuda
