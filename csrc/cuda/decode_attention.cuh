// How do decode's few queries attend to the cache, all blocks together? As a phase of a persistent kernel, split over keys.
//
// An item is a key head of a row, or of an encoder's source, and a chunk of its keys. The queries that share the keys are the
// heads of a group, or the beams of a source. A block takes items; its warps share the keys of a chunk, and `lanes` lanes share
// a key, 16 bytes each. Every lane group has its own running maximum, sum and values. They are merged in the warp, then in
// shared memory, and the block sends the chunk's values, maximum and sum. Whoever needs the result adds the chunks in order.
// Keys of earlier steps are read before the query comes. The step's own key and value come as the query does, not by the cache.
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
// Floats in shared memory: the queries, the step's own key and value, then each warp's values, maximum and sum of each query.
inline int64_t attention_floats(int64_t queries, int padded, int warps) {
  const int64_t count = queries > 1 ? kQueries : 1;
  return (count + 2) * padded + warps * count * (padded + 2);
}

namespace {

// Keys and values of one layer, and how they are divided.
template <class T> struct DecodeKeys {
  const T *key, *value;
  int64_t batch, head, row;      // strides
  int heads, sources, queries;   // key heads, rows of the cache, queries of an item
  int chunks, size;              // of keys: the most chunks, keys in each
};

template <class T, int ROWS, Form FORM> struct DecodeAttention : DecodeColumns<T, ROWS, FORM> {
  using Base = DecodeColumns<T, ROWS, FORM>;
  using Base::a, Base::m, Base::warp, Base::lane, Base::warps, Base::operand;
  using Base::V;
  static constexpr int kPacks = kMostHeadSize / (kWarp * V) > 0 ? kMostHeadSize / (kWarp * V) : 1;

  const int size, cross_size;  // keys in a chunk

  __device__ DecodeAttention(const DecodeArguments& arguments, unsigned char* shared)
      : Base(arguments, shared), size(chunk_size(false)), cross_size(arguments.call.cross_caches ? chunk_size(true) : 0) {
    if ((int)threadIdx.x < m) this->places[threadIdx.x] = place_of(threadIdx.x);
  }

  // A row's place in the cache. Behind the first barrier of the block place() knows it, without waiting for the L2.
  __device__ int place_of(int row) const { return (int)(a.call.places ? ((const int64_t*)a.call.places)[row] : a.call.place); }
  __device__ int place(int row) const { return this->places[row]; }

  // Keys that a row sees, its mask aside.
  __device__ int extent(bool cross, int row) const { return cross ? (int)a.call.source_length : place(row) + 1; }

  // Keys in a chunk.
  __device__ int chunk_size(bool cross) const {
    int most = cross ? (int)a.call.source_length : place_of(0) + 1;
    if (!cross && a.call.places)
#pragma unroll
      for (int row = 1; row < ROWS; ++row) most = max(most, place_of(min(row, m - 1)) + 1);
    const int chunks = cross ? a.cross_chunks : a.chunks, size = (most + chunks - 1) / chunks;
    return max(kLeastKeys, (size + 15) / 16 * 16);
  }

  __device__ DecodeKeys<T> keys_of(int layer, bool cross) const {
    const DecodeCall& c = a.call;
    const int at = 2 * layer + (cross ? 2 * (int)a.plan.layers : 0);
    const T *key = (const T*)a.address[at], *value = (const T*)a.address[at + 1];
    if (cross)
      return {key, value, c.cross_batch_stride, c.cross_head_stride, c.cross_row_stride, (int)a.plan.heads, (int)c.sources,
              quotient(m, (int)c.sources), a.cross_chunks, cross_size};
    return {key, value, c.batch_stride, c.head_stride, c.row_stride, (int)a.plan.kv_heads, m,
            quotient((int)a.plan.heads, (int)a.plan.kv_heads), a.chunks, size};
  }

  // Row and head of query q of an item.
  __device__ void query_of(const DecodeKeys<T>& k, bool cross, int source, int head, int q, int& row, int& of_head) const {
    row = cross ? source * k.queries + q : source, of_head = cross ? head : head * k.queries + q;
  }
  // Where a query's chunk is in `part`, in units of padded_row(head_size), and in `part_state`, in units of 4.
  __device__ int64_t part_of(int row, int head, int chunks, int chunk) const {
    return ((int64_t)row * a.plan.heads + head) * chunks + chunk;
  }

  // A block's part of attention: a key head, and keys begin .. end - 1 of a chunk.
  struct Item {
    int source, head, chunk, begin, end;
  };
  __device__ Item item_of(const DecodeKeys<T>& k, bool cross, int item) const {
    const int pair = quotient(item, k.chunks), chunk = item - pair * k.chunks;
    const int source = quotient(pair, k.heads), head = pair - source * k.heads;
    return {source, head, chunk, chunk * k.size, min(chunk * k.size + k.size, extent(cross, source))};
  }

  __device__ float* result_of(Phase phase, int layer) const {
    return (float*)((char*)a.result[(int)phase] + layer * a.layer_bytes);
  }
  __device__ float* parts_of(int layer, bool cross) const { return (float*)((char*)a.part[cross] + layer * a.layer_bytes); }
  __device__ float* states_of(int layer, bool cross) const {
    return (float*)((char*)a.part_state[cross] + layer * a.layer_bytes);
  }
  // Features of the product before attention: queries, then in self-attention keys and values.
  __device__ int attended_features(bool cross) const {
    return (int)((a.plan.heads + (cross ? 0 : 2 * a.plan.kv_heads)) * a.plan.head_size);
  }

  // Whether the block has an item.
  __device__ bool attends(bool cross) const {
    const int items = cross ? (int)a.call.sources * (int)a.plan.heads * a.cross_chunks : m * (int)a.plan.kv_heads * a.chunks;
    return (int)blockIdx.x < items;
  }

  __device__ void attend(int layer, bool cross, double scale) {
    const DecodeKeys<T> k = keys_of(layer, cross);
    const int items = k.sources * k.heads * k.chunks;
    for (int i = blockIdx.x; i < items; i += gridDim.x) {
      const Item item = item_of(k, cross, i);
      if (item.begin >= item.end) continue;
      if (Base::kPlain || k.queries == 1) visit<1>(k, layer, cross, item, 0, (float)scale);
      else
        for (int q = 0; q < k.queries; q += kQueries) visit<kQueries>(k, layer, cross, item, q, (float)scale);
    }
  }

  // Has the keys and values of the block's first item sent to the L2.
  __device__ void prefetch_keys(int layer, bool cross) const {
    const DecodeKeys<T> k = keys_of(layer, cross);
    const Item item = item_of(k, cross, blockIdx.x);
    const int64_t first = item.source * k.batch + item.head * k.head;
    for (int j = item.begin + blockDim.x - 1 - threadIdx.x; j < item.end; j += blockDim.x)
      for (int c = 0; c < (int)a.plan.head_size; c += 128 / sizeof(T)) {
        prefetch_l2(k.key + first + j * k.row + c);
        prefetch_l2(k.value + first + j * k.row + c);
      }
  }

  // A lane's part of a key and its value, as bits: taking them apart would wait for them.
  struct Seen {
    uint4 key[kPacks], value[kPacks];
    int is;      // nonzero: seen
    int bucket;  // of its distance, if there is T5's bias
  };
  // Elements own .. own + V - 1, and those `step` further on. All reads are under way at once.
  __device__ void read(const T* from, int own, int step, uint4* out) const {
    const int d = (int)a.plan.head_size;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int at = p * step + own;
      out[p] = {};
      if (at >= d) continue;
      if (Base::kPlain || a.wide_keys) {
        out[p] = __ldcg((const uint4*)(from + at));
      } else {
        Pack<T, V> pack;
#pragma unroll
        for (int i = 0; i < V; ++i) pack.at[i] = at + i < d ? __ldcg(from + at + i) : narrow<T>(0.0f);
        memcpy(&out[p], &pack, 16);
      }
    }
  }

  // V floats that are values of T, as bits.
  __device__ static uint4 narrowed(const float* from) {
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.at[i] = narrow<T>(from[i]);
    uint4 bits;
    memcpy(&bits, &pack, 16);
    return bits;
  }

  // The weight of a sum whose largest score is `peak`, beside others up to `most`. 0 for one that has seen no key, with no branch.
  // A difference of 100 costs 2^-17 of the weight, which is e^-100 then.
  __device__ static float weight_of(float peak, float most) {
    return fast_exp2((peak - (most == -INFINITY ? 0.0f : most)) * 1.4426950408889634f);
  }

  // What is added to the score of a key in a bucket: T5's bias.
  __device__ float bias(int bucket, int head) const {
    const DecodePlan& p = a.plan;
    const int64_t at = bucket * p.table_bucket + head * p.table_head;
    return p.table_float32 ? ((const float*)p.table)[at] : widen(((const T*)p.table)[at]);
  }

  // Queries q0 .. q0 + Q - 1 of an item visit keys begin .. end - 1. The block calls it together.
  template <int Q>
  __device__ void visit(const DecodeKeys<T>& k, int layer, bool cross, const Item& item, int q0, float scale) {
    const int source = item.source, head = item.head, end = item.end;
    const int d = (int)a.plan.head_size, lanes = key_lanes(d, V), padded = padded_head(d, V), own = lane % lanes * V;
    const int inner = (int)a.plan.heads * d, step = lanes * V;
    const T* keys = k.key + source * k.batch + head * k.head;
    const T* values = k.value + source * k.batch + head * k.head;
    const uint8_t* mask = (const uint8_t*)(cross ? a.call.cross_mask : a.call.mask);
    if (mask) mask += cross ? source * a.call.source_length : source * a.call.mask_stride;
    const int together = kWarp / lanes, apart = warps * together;  // keys of a warp at once, and of the block
    Seen now = {}, next = {};
    const int here = cross ? 0 : place(source), span = (int)a.plan.span;
    const bool is_biased = !cross && a.plan.table;
    const auto read_at = [&](int first, Seen& out) {
      const int j = first + lane / lanes, near = min(j, end - 1);
      read(keys + near * k.row, own, step, out.key), read(values + near * k.row, own, step, out.value);
      out.is = j < end;
      if (mask && j < end) out.is = mask[j];
      if (is_biased) out.bucket = ((const int*)a.plan.buckets)[max(near - here, -span) + span];
    };
    int first = item.begin + warp * together;
    if (first < end) read_at(first, now);
    float *queries = operand, *fresh = queries + Q * padded, *states = fresh + 2 * padded;
    const bool is_last = !cross && end == here + 1;  // the chunk has the step's own key
    const float* product = result_of(cross ? Phase::kCrossQuery : Phase::kQueryKeyValue, layer);
    const int pitch = padded_row(attended_features(cross));
    __syncthreads();  // the last item's states have been read
    for (int i = threadIdx.x; i < (Q + 2 * is_last) * padded; i += blockDim.x) {
      const int q = quotient(i, padded), c = i - q * padded;
      int row = source, at = inner + ((q - Q) * k.heads + head) * d + c;
      if (q < Q) {
        int of_head;
        query_of(k, cross, source, head, min(q0 + q, k.queries - 1), row, of_head);
        at = of_head * d + c;
      }
      Pack<float, 1> found[1] = {};
      if (c < d) receive(found, [&](int) { return product + (int64_t)row * pitch + at; }, [](int) { return 1; });
      queries[i] = q < Q ? found[0].at[0] * scale : found[0].at[0];
    }
    __syncthreads();
    float peak[Q], total[Q], sum[Q][kPacks * V] = {};
#pragma unroll
    for (int q = 0; q < Q; ++q) peak[q] = -INFINITY, total[q] = 0;
    for (; first < end; first += apart) {  // the same for the whole warp
      if (first + apart < end) read_at(first + apart, next);
      if (is_last && first + lane / lanes == here) {
#pragma unroll
        for (int p = 0; p < kPacks; ++p)
          if (const int at = p * step + own; at < d) {
            now.key[p] = narrowed(fresh + at);
            now.value[p] = narrowed(fresh + padded + at);
          }
      }
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        float score = 0;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (p * step >= d) break;
          const float* query = queries + q * padded + p * step + own;
          Pack<T, V> key;
          memcpy(&key, &now.key[p], 16);
#pragma unroll
          for (int i = 0; i < V; i += 4) {
            const Pack<float, 4> four = load<4>(query + i);
#pragma unroll
            for (int e = 0; e < 4; ++e) score += four.at[e] * widen(key.at[i + e]);
          }
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(kAllLanes, score, offset);
        if (!now.is) continue;  // no lane waits for another until the next query
        if (is_biased) score += bias(now.bucket, head * k.queries + min(q0 + q, k.queries - 1));
        const float before = peak[q];
        peak[q] = fmaxf(before, score);
        const float kept = weight_of(before, peak[q]), weight = weight_of(score, peak[q]);
        total[q] = total[q] * kept + weight;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          if (p * step >= d) break;
          Pack<T, V> value;
          memcpy(&value, &now.value[p], 16);
#pragma unroll
          for (int i = 0; i < V; ++i) sum[q][p * V + i] = sum[q][p * V + i] * kept + weight * widen(value.at[i]);
        }
      }
      now = next;
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      for (int offset = lanes; offset < kWarp; offset *= 2) {  // the lane groups of the warp
        const float other = __shfl_xor_sync(kAllLanes, peak[q], offset), most = fmaxf(peak[q], other);
        const float mine = weight_of(peak[q], most), theirs = weight_of(other, most);
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
      const int q = Q == 1 ? 0 : i / d, c = i - q * d;
      if (q0 + q >= k.queries) break;
      int row, of_head;
      query_of(k, cross, source, head, q0 + q, row, of_head);
      const float* state = states + q * (padded + 2);
      const int of_warp = Q * (padded + 2);
      float peaks[kDecodeWarps], most = -INFINITY, all = 0, value = 0;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        peaks[w] = w < warps ? state[w * of_warp + padded] : -INFINITY;
        most = fmaxf(most, peaks[w]);
      }
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const int at = min(w, warps - 1) * of_warp;
        const float weight = weight_of(peaks[w], most);
        all += state[at + padded + 1] * weight, value += state[at + c] * weight;
      }
      const int64_t to = part_of(row, of_head, k.chunks, item.chunk);
      send(parts_of(layer, cross) + to * padded_row(d) + c, value);
      if (c == 0) send(states_of(layer, cross) + to * 4, most), send(states_of(layer, cross) + to * 4 + 1, all);
    }
  }

  // put(row, c, count, quad) for all quads of attention's result: elements c .. c + count - 1 of a row. They are the chunks'
  // values, weighted by their sums. A row that sees no key gives zeros. A thread has the same quad of several rows, and all that
  // it reads of some chunks is under way at once.
  template <class Put> __device__ void attended(int layer, bool cross, const Put& put) const {
    constexpr int TOGETHER = ROWS < 4 ? ROWS : ROWS < 8 || Base::kPlain ? 4 : 2;  // with 4 of 8 some registers would spill
    constexpr int CHUNKS = ROWS < 4 ? 4 : 2, EACH = TOGETHER * CHUNKS;
    const float *parts = parts_of(layer, cross), *states = states_of(layer, cross);
    const int d = (int)a.plan.head_size, pitch = padded_row(d), heads = (int)a.plan.heads;
    const int chunks = cross ? a.cross_chunks : a.chunks, keys = cross ? cross_size : size;
    for (int i = threadIdx.x; i < heads * pitch / 4; i += blockDim.x) {
      const int head = quotient(i, pitch / 4), at = i * 4 - head * pitch;
      for (int first = 0; first < m; first += TOGETHER) {
        Pack<float, 4> value[TOGETHER] = {};
        float most[TOGETHER], total[TOGETHER] = {};
        int seen[TOGETHER], longest = 0;
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
          most[r] = -INFINITY, seen[r] = first + r < m ? extent(cross, first + r) : 0;
          longest = max(longest, seen[r]);
        }
        for (int chunk = 0; chunk * keys < longest; chunk += CHUNKS) {
          Pack<float, 4> found[2 * EACH];  // each chunk's values, then their states
#pragma unroll
          for (int i = 0; i < EACH; ++i) found[i] = {}, found[EACH + i] = {-INFINITY, 0};
          receive(
              found,
              [&](int i) -> const float* {
                const int r = i % EACH / CHUNKS, j = i % CHUNKS;
                if ((chunk + j) * keys >= seen[r]) return nullptr;
                const int64_t from = part_of(first + r, head, chunks, chunk + j);
                return i < EACH ? parts + from * pitch + at : states + from * 4;
              },
              [&](int i) { return i < EACH ? min(4, d - at) : 2; });
#pragma unroll
          for (int r = 0; r < TOGETHER; ++r) {
            const float before = most[r];
#pragma unroll
            for (int j = 0; j < CHUNKS; ++j) most[r] = fmaxf(most[r], found[EACH + r * CHUNKS + j].at[0]);
            const float kept = weight_of(before, most[r]);
            total[r] *= kept;
#pragma unroll
            for (int e = 0; e < 4; ++e) value[r].at[e] *= kept;
#pragma unroll
            for (int j = 0; j < CHUNKS; ++j) {
              const Pack<float, 4>&part = found[r * CHUNKS + j], &state = found[EACH + r * CHUNKS + j];
              const float weight = weight_of(state.at[0], most[r]);
              total[r] += state.at[1] * weight;
#pragma unroll
              for (int e = 0; e < 4; ++e) value[r].at[e] += part.at[e] * weight;
            }
          }
        }
#pragma unroll
        for (int r = 0; r < TOGETHER; ++r) {
          if (first + r >= m) break;
          const float per_total = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
#pragma unroll
          for (int e = 0; e < 4; ++e) value[r].at[e] *= per_total;
          put(first + r, head * d + at, min(4, d - at), value[r]);
        }
      }
    }
  }
};

}  // namespace
}  // namespace pyfused
