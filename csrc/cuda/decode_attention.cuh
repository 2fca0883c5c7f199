// How do decode's few queries attend to the cache, all blocks together? As a phase of a persistent kernel, split over keys.
//
// An item is a key head of a row, or of an encoder's source, and a chunk of its keys. The queries that share the keys are the
// heads of a group, or the beams of a source. A block takes items; its warps share the keys of a chunk, and `lanes` lanes share
// a key, 16 bytes each. Every lane group has its own running maximum, sum and values. They are merged in the warp, then in
// shared memory, and the block writes the chunk's values, maximum and sum. Whoever reads the result adds the chunks in order.
//
// There are about kItemsWanted items: one for each multiprocessor of an H100, a constant, so that the chunks, and the last bit,
// depend on the shape alone. A chunk has at least 64 keys, four for each warp.
#pragma once

#include "decode_columns.cuh"

namespace pyfused {

constexpr int kItemsWanted = 132, kMostChunks = 32, kLeastKeys = 64;
constexpr int kQueries = 4;        // at once; more visit the keys again, in the L2
constexpr int kMostHeadSize = 256;

// The most chunks of a row's keys, whatever their number.
__host__ __device__ inline int most_chunks(int64_t heads) {
  const int64_t chunks = heads > 0 ? kItemsWanted / heads : 1;
  return (int)(chunks < 1 ? 1 : chunks < kMostChunks ? chunks : kMostChunks);
}

// Lanes that share a key of d elements, 16 bytes each: a power of two. Their elements, a multiple of 16 bytes.
__host__ __device__ inline int key_lanes(int d, int vector) {
  int lanes = 1;
  while (lanes < kWarp && lanes * vector < d) lanes *= 2;
  return lanes;
}
__host__ __device__ inline int padded_head(int d, int vector) {
  const int together = key_lanes(d, vector) * vector;
  return (d + together - 1) / together * together;
}
// Floats in shared memory: the queries, then each warp's values, maximum and sum of each.
inline int64_t attention_floats(int64_t queries, int padded, int warps) {
  const int64_t count = queries > 1 ? kQueries : 1;
  return count * padded + warps * count * (padded + 2);
}

namespace {

// Keys and values of one layer, and how they are divided.
template <class T> struct DecodeKeys {
  const T *key, *value;
  int64_t batch, head, row;      // strides
  int heads, sources, queries;   // key heads, rows of the cache, queries of an item
  int chunks, size;              // of keys: the most chunks, keys in each
};

template <class T, int ROWS> struct DecodeAttention : DecodeColumns<T, ROWS> {
  using Base = DecodeColumns<T, ROWS>;
  using Base::a, Base::m, Base::warp, Base::lane, Base::warps, Base::operand;
  using Base::V;
  static constexpr int kPacks = kMostHeadSize / (kWarp * V) > 0 ? kMostHeadSize / (kWarp * V) : 1;

  const int size, cross_size;  // keys in a chunk

  __device__ DecodeAttention(const DecodeArguments& arguments, unsigned char* shared)
      : Base(arguments, shared), size(chunk_size(false)), cross_size(arguments.call.cross_caches ? chunk_size(true) : 0) {}

  __device__ int place(int row) const { return (int)(a.call.places ? ((const int64_t*)a.call.places)[row] : a.call.place); }

  // Keys that a row sees, its mask aside.
  __device__ int extent(bool cross, int row) const { return cross ? (int)a.call.source_length : place(row) + 1; }

  // Keys in a chunk.
  __device__ int chunk_size(bool cross) const {
    int most = extent(cross, 0);
    if (!cross && a.call.places)
      for (int row = 1; row < m; ++row) most = max(most, place(row) + 1);
    const int chunks = cross ? a.cross_chunks : a.chunks, size = (most + chunks - 1) / chunks;
    return max(kLeastKeys, (size + 15) / 16 * 16);
  }

  __device__ DecodeKeys<T> keys_of(int layer, bool cross) const {
    const DecodeCall& c = a.call;
    const int at = 2 * layer + (cross ? 2 * (int)a.plan.layers : 0);
    const T *key = (const T*)a.address[at], *value = (const T*)a.address[at + 1];
    if (cross)
      return {key, value, c.cross_batch_stride, c.cross_head_stride, c.cross_row_stride, (int)a.plan.heads, (int)c.sources,
              m / (int)c.sources, a.cross_chunks, cross_size};
    return {key, value, c.batch_stride, c.head_stride, c.row_stride, (int)a.plan.kv_heads, m,
            (int)(a.plan.heads / a.plan.kv_heads), a.chunks, size};
  }

  // Row and head of query q of an item.
  __device__ void query_of(const DecodeKeys<T>& k, bool cross, int source, int head, int q, int& row, int& of_head) const {
    row = cross ? source * k.queries + q : source, of_head = cross ? head : head * k.queries + q;
  }
  // Where a query's chunk is in `part`, in units of head_size, and in `part_state`, in units of 2.
  __device__ int64_t part_of(int row, int head, int chunks, int chunk) const {
    return ((int64_t)row * a.plan.heads + head) * chunks + chunk;
  }

  __device__ void attend(int layer, bool cross, double scale) {
    const DecodeKeys<T> k = keys_of(layer, cross);
    const int items = k.sources * k.heads * k.chunks;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const int chunk = item % k.chunks, head = item / k.chunks % k.heads, source = item / k.chunks / k.heads;
      const int begin = chunk * k.size, end = min(begin + k.size, extent(cross, source));
      if (begin >= end) continue;
      const float by = (float)scale;
      if (k.queries == 1) visit<1>(k, cross, source, head, chunk, 0, begin, end, by);
      else
        for (int q = 0; q < k.queries; q += kQueries) visit<kQueries>(k, cross, source, head, chunk, q, begin, end, by);
    }
  }

  // The part of a key or value that belongs to a lane.
  __device__ Pack<T, V> read(const T* row, int at) const {
    const int d = (int)a.plan.head_size;
    if (a.wide_keys && at < d) return load_shared_by_grid<V>(row + at);
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.at[i] = at + i < d ? __ldcg(row + at + i) : narrow<T>(0.0f);
    return out;
  }

  // What is added to the score of a key at `distance` <= 0 from the query: T5's bias.
  __device__ float bias(int distance, int head) const {
    const DecodePlan& p = a.plan;
    const int span = (int)p.span, bucket = ((const int*)p.buckets)[max(distance, -span) + span];
    const int64_t at = bucket * p.table_bucket + head * p.table_head;
    return p.table_float32 ? ((const float*)p.table)[at] : widen(((const T*)p.table)[at]);
  }

  // Queries q0 .. q0 + Q - 1 of an item visit keys begin .. end - 1. The block calls it together.
  template <int Q>
  __device__ void visit(const DecodeKeys<T>& k, bool cross, int source, int head, int chunk, int q0, int begin, int end,
                        float scale) {
    const int d = (int)a.plan.head_size, lanes = key_lanes(d, V), padded = padded_head(d, V), own = lane % lanes * V;
    const int inner = (int)a.plan.heads * d, step = lanes * V;
    float *queries = operand, *states = queries + Q * padded;
    __syncthreads();  // the last item's states have been read
    for (int i = threadIdx.x; i < Q * padded; i += blockDim.x) {
      const int q = i / padded, c = i % padded;
      int row, of_head;
      query_of(k, cross, source, head, min(q0 + q, k.queries - 1), row, of_head);
      queries[i] = c < d ? __ldcg(a.query + (int64_t)row * inner + of_head * d + c) * scale : 0.0f;
    }
    __syncthreads();
    const T* keys = k.key + source * k.batch + head * k.head;
    const T* values = k.value + source * k.batch + head * k.head;
    const uint8_t* mask = (const uint8_t*)(cross ? a.call.cross_mask : a.call.mask);
    if (mask) mask += cross ? source * a.call.source_length : source * a.call.mask_stride;
    const int here = cross ? 0 : place(source);
    float peak[Q], total[Q], sum[Q][kPacks * V] = {};
#pragma unroll
    for (int q = 0; q < Q; ++q) peak[q] = -INFINITY, total[q] = 0;
    const int together = kWarp / lanes;  // keys of a warp at once
    for (int first = begin + warp * together; first < end; first += warps * together) {  // the same for the whole warp
      const int j = first + lane / lanes;
      const bool seen = j < end && (!mask || mask[j]);
      const int64_t at = (int64_t)(j < end ? j : end - 1) * k.row;
      Pack<T, V> key[kPacks], value[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        if (p * step >= d) break;
        key[p] = read(keys + at, p * step + own), value[p] = read(values + at, p * step + own);
      }
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        float score = 0;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (p * step >= d) break;
          const float* query = queries + q * padded + p * step + own;
#pragma unroll
          for (int i = 0; i < V; i += 4) {
            const Pack<float, 4> four = load<4>(query + i);
#pragma unroll
            for (int e = 0; e < 4; ++e) score += four.at[e] * widen(key[p].at[i + e]);
          }
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(kAllLanes, score, offset);
        if (!seen) continue;  // no lane waits for another until the next query
        if (!cross && a.plan.table) score += bias(j - here, head * k.queries + min(q0 + q, k.queries - 1));
        const float before = peak[q];
        peak[q] = fmaxf(before, score);
        const float kept = before == -INFINITY ? 0.0f : expf(before - peak[q]), weight = expf(score - peak[q]);
        total[q] = total[q] * kept + weight;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (p * step >= d) break;
#pragma unroll
          for (int i = 0; i < V; ++i) sum[q][p * V + i] = sum[q][p * V + i] * kept + weight * widen(value[p].at[i]);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      for (int offset = lanes; offset < kWarp; offset *= 2) {  // the lane groups of the warp
        const float other = __shfl_xor_sync(kAllLanes, peak[q], offset), most = fmaxf(peak[q], other);
        const float mine = peak[q] == -INFINITY ? 0.0f : expf(peak[q] - most);
        const float theirs = other == -INFINITY ? 0.0f : expf(other - most);
        total[q] = total[q] * mine + __shfl_xor_sync(kAllLanes, total[q], offset) * theirs, peak[q] = most;
#pragma unroll
        for (int i = 0; i < kPacks * V; ++i)
          sum[q][i] = sum[q][i] * mine + __shfl_xor_sync(kAllLanes, sum[q][i], offset) * theirs;
      }
      float* state = states + (warp * Q + q) * (padded + 2);
      if (lane < lanes) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (p * step >= d) break;
#pragma unroll
          for (int i = 0; i < V; ++i) state[p * step + own + i] = sum[q][p * V + i];
        }
      }
      if (lane == 0) state[padded] = peak[q], state[padded + 1] = total[q];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Q * d; i += blockDim.x) {  // the warps of the block
      const int q = i / d, c = i % d;
      if (q0 + q >= k.queries) break;
      int row, of_head;
      query_of(k, cross, source, head, q0 + q, row, of_head);
      const float* state = states + q * (padded + 2);
      const int next = Q * (padded + 2);
      float most = -INFINITY, all = 0, value = 0;
      for (int w = 0; w < warps; ++w) most = fmaxf(most, state[w * next + padded]);
      for (int w = 0; w < warps; ++w) {
        const float peak_of_warp = state[w * next + padded];
        const float weight = peak_of_warp == -INFINITY ? 0.0f : expf(peak_of_warp - most);
        all += state[w * next + padded + 1] * weight, value += state[w * next + c] * weight;
      }
      const int64_t to = part_of(row, of_head, k.chunks, chunk);
      a.part[to * d + c] = value;
      if (c == 0) a.part_state[to * 2] = most, a.part_state[to * 2 + 1] = all;
    }
  }

  // Element c of a row of attention's result: its chunks, weighted by their sums. A row that sees no key gives zeros.
  __device__ float attended(bool cross, int row, int c) const {
    const int d = (int)a.plan.head_size, most_of_all = cross ? a.cross_chunks : a.chunks;
    const int keys = cross ? cross_size : size, chunks = (extent(cross, row) + keys - 1) / keys;
    const int64_t first = part_of(row, c / d, most_of_all, 0);
    const float *part = a.part + first * d + c % d, *state = a.part_state + first * 2;
    float most = __ldcg(state), total = __ldcg(state + 1), value = __ldcg(part);
    if (chunks > 1) {
      for (int i = 1; i < chunks; ++i) most = fmaxf(most, __ldcg(state + 2 * i));
      total = value = 0;
#pragma unroll 4
      for (int i = 0; i < chunks; ++i) {
        const float peak = __ldcg(state + 2 * i), weight = peak == -INFINITY ? 0.0f : expf(peak - most);
        total += __ldcg(state + 2 * i + 1) * weight, value += __ldcg(part + (int64_t)i * d) * weight;
      }
    }
    return total == 0.0f ? 0.0f : value / total;
  }
};

}  // namespace
}  // namespace pyfused
