// What do attention's CUDA kernels share? Arguments, the rows and keys of a block, tile loads, and dropout's bits.
#pragma once

#include <cmath>

#include "kernels.h"
#include "pyfused/attention_layout.h"
#include "pyfused/device.cuh"
#include "pyfused/launch.h"
#include "pyfused/tensor_core.cuh"

namespace pyfused::cuda {

// Defined in attention_float32.cu. packed: a block has the rows of all heads that share a key head. chunk: keys of a block.
void attention_float32(const Launch& launch, const AttentionPointers& p, bool packed, int64_t chunk, addr stream);

namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNever = -INFINITY;  // the score of a key that a query may not see

// A kernel's arguments. A block's rows are the queries of one head. If packed, they are the queries of all `pack` heads that
// share a key head, so keys are read once for all of them. Strides count elements.
struct Attention {
  const void *query, *key, *value, *bias;
  const unsigned char* mask;  // (B, Sk), nonzero is a real token
  const int64_t* seed;
  void* out;   // (B, H, Sq, D) in the inputs' dtype; if keys are split, float32 (chunks, B, H, Sq, D)
  float* lse;  // (B, H, Sq); if keys are split, (chunks, B, H, Sq); may be null
  // Packed sequences: (B + 1,), where each one begins among all sq = sk rows. Null for a batch.
  const int* cu_seqlens;
  int b, h, group, sq, sk, d;
  int pack, chunk;  // chunk: keys of a block in the grid's second dimension
  // T5's bias: table[buckets[distance + span], head], distance = key - query position, clamped to [-span, span].
  const void* table;  // float32 or the inputs' dtype
  const int* buckets;
  int64_t table_stride[2];
  int span;
  bool table_float32;
  // The first of three strides leads from one origin (Place) to the next.
  int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3], bias_stride[4], chunk_stride, lse_stride;
  bool causal, aligned, bias_pairs;
  float scale, keep_scale;
  uint32_t threshold;
};

// ---- which rows and keys --------------------------------------------------------------------------------------------
// A block's place: its set of heads, its batch entry or sequence, and its rows [first, first + block rows) of `rows`. A
// sequence counts rows from its own start. Addresses begin at `origin`: the batch entry, or the number of rows before the
// sequence.
struct Place {
  int batch, set, first, rows, origin;
};

// Tiles of rows for each set of heads. The tiles of sequence n begin at cu_seqlens[n] / block_rows + n. It has as many as
// it needs, or one empty tile more. So the grid depends only on the sum of the sequences' lengths.
inline int64_t tiles_of(const Attention& a, int block_rows) {
  if (a.cu_seqlens) return (int64_t)a.sq / block_rows + a.b;
  return up((int64_t)a.pack * a.sq, block_rows) * a.b;
}

// Every lane calls it and helps to find the sequence: 32 sequences take one vote, 1024 take two. A place may be empty.
__device__ inline Place place_in_sequences(const Attention& a, int block_rows) {
  const unsigned tiles = (unsigned)(a.sq / block_rows + a.b);
  const int tile = (int)(blockIdx.x % tiles), lane = threadIdx.x % kWarp;
  int n = 0;  // the last sequence whose tiles begin at or before this one lies in [n, end)
  for (int end = a.b; end - n > 1;) {
    const int step = (end - n + kWarp - 1) / kWarp, at = n + lane * step;
    const bool before = at < end && a.cu_seqlens[at] / block_rows + at <= tile;
    const int count = __popc(__ballot_sync(kAllLanes, before));
    end = min(end, n + count * step), n += (count - 1) * step;
  }
  const int origin = a.cu_seqlens[n], next = a.cu_seqlens[n + 1], length = next - origin;
  return {n, (int)(blockIdx.x / tiles), (next / block_rows + n - tile) * block_rows, length, origin};
}

// first is below 0 if there are rows behind the last sequence, which should not happen.
__device__ inline bool is_empty(const Place& place) { return (unsigned)place.first >= (unsigned)place.rows; }

// Under a causal mask late rows have the most keys. Their blocks start first, so the last wave is short.
template <bool SEQUENCES> __device__ Place place_of(const Attention& a, int block_rows) {
  if constexpr (SEQUENCES) return place_in_sequences(a, block_rows);
  const unsigned rows = (unsigned)(a.pack * a.sq), tiles = (rows + block_rows - 1) / block_rows, sets = a.h / a.pack;
  const unsigned above = blockIdx.x / tiles, tile = tiles - 1 - blockIdx.x % tiles;
  const int batch = (int)(above / sets);
  return {batch, (int)(above % sets), (int)(tile * block_rows), (int)rows, batch};
}

// A row's head and query. Rows past the last copy it and are never written.
struct Row {
  int head, query;
};
__device__ inline Row row_at(const Attention& a, const Place& place, int row) {
  row = row < place.rows ? row : place.rows - 1;
  if (a.pack == 1) return {place.set, row};
  return {place.set * a.pack + row / a.sq, row % a.sq};
}

template <class T> __device__ const T* query_row(const Attention& a, const Place& place, int row) {
  const Row r = row_at(a, place, row);
  const T* query = (const T*)a.query + place.origin * a.query_stride[0];
  return query + r.head * a.query_stride[1] + r.query * a.query_stride[2];
}

// The index of a row in lse.
__device__ inline int64_t flat_row(const Attention& a, const Place& place, const Row& row) {
  return place.origin * a.lse_stride + (int64_t)row.head * a.sq + row.query;
}

// The keys [first, end) that any row of a block sees. `mask` is the batch entry's row of the padding mask, or null if there
// are no holes. A padded row is nearly always one run of real tokens, and tiles inside the run need no mask.
struct Keys {
  int first, end;
  const unsigned char* mask;  // null: no holes
};

// Every thread calls it; scratch holds 3 numbers for each warp. The mask, a byte per key, stays in cache. A separate
// kernel that reads it once for all blocks would cost a launch.
template <bool SEQUENCES>
__device__ Keys keys_of(const Attention& a, const Place& place, int block_rows, int* scratch) {
  // The mask of packed sequences is null. With a literal nullptr the compiler hoists so many addresses that the kernel of
  // 128 rows spills.
  if constexpr (SEQUENCES) return {0, a.causal ? min(place.first + block_rows, place.rows) : place.rows, a.mask};
  const int chunk_first = (int)blockIdx.y * a.chunk;
  int end = min(a.sk - chunk_first, a.chunk) + chunk_first;
  if (a.causal) {
    const int last = a.pack == 1 ? min(place.first + block_rows, place.rows) - 1 : a.sq - 1;
    end = min(end, last + a.sk - a.sq + 1);
  }
  if (!a.mask) return {chunk_first, end, nullptr};
  const unsigned char* mask = a.mask + (int64_t)place.batch * a.sk;
  int first = end, last = chunk_first - 1, count = 0;
  for (int key = chunk_first + (int)threadIdx.x; key < end; key += (int)blockDim.x)
    if (mask[key]) first = min(first, key), last = key, ++count;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    first = min(first, __shfl_xor_sync(kAllLanes, first, offset));
    last = max(last, __shfl_xor_sync(kAllLanes, last, offset));
    count += __shfl_xor_sync(kAllLanes, count, offset);
  }
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[3 * warp] = first, scratch[3 * warp + 1] = last, scratch[3 * warp + 2] = count;
  __syncthreads();
  count = 0;
  for (int w = 0; w < warps; ++w) {
    first = min(first, scratch[3 * w]);
    last = max(last, scratch[3 * w + 1]);
    count += scratch[3 * w + 2];
  }
  return {first, last + 1, count == last + 1 - first ? nullptr : mask};
}

// The last key that a query sees.
__device__ inline int last_key(const Attention& a, const Keys& keys, int query) {
  return a.causal ? min(query + a.sk - a.sq, keys.end - 1) : keys.end - 1;
}

// ---- T5's bias ------------------------------------------------------------------------------------------------------
inline __host__ __device__ int distances(const Attention& a) { return a.table ? a.pack * (2 * a.span + 1) : 0; }

// Stores the biases of a block's heads by distance, times `unit`, in shared memory. A gather from there costs less than
// the bucket's formula. A barrier must follow.
template <class T>
__device__ void fill_distances(const Attention& a, const Place& place, float unit, float* by_distance) {
  const int width = 2 * a.span + 1;
  for (int i = threadIdx.x; i < distances(a); i += blockDim.x) {
    const int64_t at = a.buckets[i % width] * a.table_stride[0] + (place.set * a.pack + i / width) * a.table_stride[1];
    by_distance[i] = unit * (a.table_float32 ? ((const float*)a.table)[at] : widen(((const T*)a.table)[at]));
  }
}

// ---- tiles ----------------------------------------------------------------------------------------------------------
// The place of a row's 16-byte chunk `chunk` in a tile of D 16-bit columns. An XOR permutes the chunks of a row, so the eight
// rows that ldmatrix reads together hit all 32 banks. Rows 8 apart have the same permutation.
template <int D> __device__ inline int swizzled(unsigned row, unsigned chunk) {
  constexpr unsigned chunks = D / 8, period = chunks % 8 == 0 ? 8 : chunks % 4 == 0 ? 4 : 2;
  return (int)(row * D + (chunk ^ row / (8 / period) % period) * 8);
}

// Starts copying the elements [at, at + 16 bytes) of a row into shared memory. Past the head size, and if !live, it writes
// zeros: memory there may hold NaN, and 0 * NaN would reach a sum. Rows that are not ALIGNED to 16 bytes have their own
// kernels: their copy passes through registers, element by element.
template <bool ALIGNED, class T> __device__ inline void copy_chunk(T* to, const T* row, int at, int d, bool live) {
  if constexpr (ALIGNED) {
    cp_async16(to, row + at, live && at < d);
  } else {
    constexpr int V = 16 / sizeof(T);
    Pack<T, V> v;
#pragma unroll
    for (int j = 0; j < V; ++j) v.at[j] = live && at + j < d ? row[at + j] : narrow<T>(0.0f);
    store<V>(to, v);
  }
}

__device__ inline bool is_live(const Keys& keys, int key) {
  return key >= keys.first && key < keys.end && (!keys.mask || keys.mask[key]);
}

// ---- dropout --------------------------------------------------------------------------------------------------------
// Philox4x32-10 (Salmon et al. 2011) as in kernels/reference/_philox.py: the words for keys 4 * quad to 4 * quad + 3.
__device__ inline void philox(int64_t seed, uint32_t quad, uint32_t query, uint32_t flat_head, uint32_t (&c)[4]) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
  c[0] = quad, c[1] = query, c[2] = flat_head, c[3] = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
    c[0] = (uint32_t)(p1 >> 32) ^ c[1] ^ k0, c[1] = (uint32_t)p1;
    c[2] = (uint32_t)(p0 >> 32) ^ c[3] ^ k1, c[3] = (uint32_t)p0;
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------
inline Attention arguments(const AttentionPointers& p, bool packed, int64_t chunk, int element_size) {
  const auto& n = *(const AttentionLayout*)p.layout;
  const int v = 16 / element_size;
  Attention a{};
  a.query = (const void*)p.query, a.key = (const void*)p.key, a.value = (const void*)p.value;
  a.bias = (const void*)p.bias, a.mask = (const unsigned char*)p.mask, a.seed = (const int64_t*)p.seed;
  a.out = (void*)p.out, a.lse = (float*)p.lse, a.cu_seqlens = (const int*)p.cu_seqlens;
  a.b = (int)n.batch, a.h = (int)n.heads, a.group = (int)(n.heads / n.kv_heads);
  a.sq = (int)n.query_length, a.sk = (int)n.key_length, a.d = (int)n.head_size;
  a.pack = packed ? a.group : 1, a.chunk = (int)chunk;
  a.aligned = aligned16({p.query, p.key, p.value, p.out}) && a.d % v == 0;
  const int64_t query_sizes[] = {n.batch, n.heads, n.query_length}, key_sizes[] = {n.batch, n.kv_heads, n.key_length};
  for (int i = 0; i < 3; ++i) {
    const int from = i == 0 && p.cu_seqlens ? 2 : i;  // an origin of packed sequences is a row
    a.query_stride[i] = n.query[from], a.key_stride[i] = n.key[from], a.value_stride[i] = n.value[from];
    a.out_stride[i] = n.out[from];
    if (query_sizes[i] > 1) a.aligned = a.aligned && a.query_stride[i] % v == 0;
    if (key_sizes[i] > 1) a.aligned = a.aligned && a.key_stride[i] % v == 0 && a.value_stride[i] % v == 0;
  }
  a.lse_stride = p.cu_seqlens ? 1 : n.heads * n.query_length;
  for (int i = 0; i < 4; ++i) a.bias_stride[i] = n.bias[i];
  a.chunk_stride = n.chunk;
  a.table = (const void*)p.table, a.buckets = (const int*)p.buckets;
  a.table_stride[0] = n.table_bucket, a.table_stride[1] = n.table_head;
  a.span = (int)n.span, a.table_float32 = n.table_float32 != 0;
  // One load reads two neighbours of a 16-bit bias if every pair is 4-byte aligned and within a row.
  a.bias_pairs = p.bias && p.bias % 4 == 0 && n.bias[3] == 1 && a.sk % 2 == 0 && n.bias[0] % 2 == 0 &&
                 n.bias[1] % 2 == 0 && n.bias[2] % 2 == 0;
  a.causal = n.is_causal != 0;
  a.scale = (float)n.scale;
  a.keep_scale = 1.0f;
  if (p.seed) {
    const double words = nearbyint(n.dropout_p * 4294967296.0);
    a.threshold = words < 4294967295.0 ? (uint32_t)words : 0xffffffffu;
    a.keep_scale = (float)(1.0 / (1.0 - n.dropout_p));
  }
  return a;
}

// Whether a size in the layout is 0. A size may be a divisor, and a grid must not be empty. Plain PyTorch computes such calls.
inline bool has_no_work(const AttentionLayout& n) {
  return !n.batch || !n.heads || !n.kv_heads || !n.query_length || !n.key_length || !n.head_size;
}

// The average number of rows per batch entry or sequence in a set of heads.
inline int64_t mean_rows(const Attention& a) { return a.cu_seqlens ? up(a.sq, a.b) : (int64_t)a.pack * a.sq; }

}  // namespace
}  // namespace pyfused::cuda
