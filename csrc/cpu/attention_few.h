// How does attention decode? For a few queries and many keys, key and value rows are streamed once, in place.
//
// Here keys are in the lanes: kWidth dot products are reduced together, so nothing is packed or transposed. Query heads
// that share a key head are taken together. If there are fewer key heads than threads, the keys are split, and partial
// results are combined in the order of the splits (repeatable for a given number of threads). Rows are read in pairs of vectors
// (multiply.h), which widens bfloat16 in half as many instructions: queries and sums of values have the order of these pairs.
//
// With 12 heads of 64 and 128 keys, one query's call from Python takes as long as the kernel.
#pragma once

#include "attention_tile.h"
#include "pyfused/multiply.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// The result has type O: float in decode.
template <class T, class O = T> struct Few {
  static constexpr int64_t kMost = kWidth / 2, kTile = 256, kLeastSplit = 256;
  // Whether to fetch the next keys ahead: with AVX-512 half precision then takes 0.92 of the time where the keys are not in L2. float32
  // takes 0.92 if the values are fetched too; half precision is not faster then.
  static constexpr bool kAhead = kWidth == 16;
  Problem<T> p;
  O* out;
  float* lse;

  static bool fits(const Problem<T>& p) { return p.sq <= kMost && !p.dropout && !p.starts; }

  // A split's state of one query: highest score, sum of exponentials, weighted sum of values.
  int64_t padded() const { return (p.d + kWidth - 1) / kWidth * kWidth; }
  int64_t state_size() const { return 2 + padded(); }

  PYFUSED_INLINE vfloat get(const T* x, int64_t i) const {
    return p.d - i >= kWidth ? load(x + i) : load_partial(x + i, p.d - i);
  }

  // A query, scaled, in the order of pairs and padded with zeros.
  template <class X> static void take(const X* from, int64_t d, float scale, float* to) {
    int64_t i = 0;
    for (; i + kPairStep <= d; i += kPairStep) {
      const Pair x = pair_for<T>(from + i);
      store(to + i, x.a * scale);
      store(to + i + kWidth, x.b * scale);
    }
    for (; i < d; i += kWidth) store(to + i, (d - i >= kWidth ? load(from + i) : load_partial(from + i, d - i)) * scale);
  }

  // Scores of keys c0 .. c0 + n - 1 (n <= kWidth).
  PYFUSED_INLINE vfloat scores(const float* query, const T* const* row) const {
    vfloat dot[kWidth] = {};
    int64_t i = 0;
    for (; i + kPairStep <= p.d; i += kPairStep) {
      const vfloat first = load(query + i), second = load(query + i + kWidth);
#pragma GCC unroll 16
      for (int u = 0; u < kWidth; ++u) {
        const Pair x = load_pair(row[u] + i);
        dot[u] += first * x.a;
        dot[u] += second * x.b;
      }
    }
    for (; i + kWidth <= p.d; i += kWidth) {
      const vfloat q = load(query + i);
#pragma GCC unroll 16
      for (int u = 0; u < kWidth; ++u) dot[u] += q * load(row[u] + i);
    }
    if (i < p.d)
      for (int u = 0; u < kWidth; ++u) dot[u] += load(query + i) * load_partial(row[u] + i, p.d - i);
    return sums_of_lanes(dot);
  }

  // sum[0 .. N kWidth) = sum * factor + weights x value rows, for the columns from i on.
  template <int N>
  PYFUSED_INLINE void add_values(float* sum, float factor, const float* weight, const T* base, const int32_t* position,
                                 int64_t n, int64_t i) const {
    constexpr int kChains = N < 8 ? 2 : 1;  // of sums: a multiply-add waits four cycles for the one before
    vfloat acc[kChains][N] = {};
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) acc[0][u] = load(sum + i + u * kWidth) * factor;
    auto add = [&](int64_t c, vfloat* to) __attribute__((always_inline)) {
      const T* row = base + position[c] * p.value.row + i;
      const vfloat w = splat(weight[c]);
      if constexpr (N == 1) {
        to[0] += w * get(row - i, i);
      } else {
#pragma GCC unroll 8
        for (int u = 0; u < N; u += 2) {
          const Pair x = load_pair(row + u * kWidth);
          to[u] += w * x.a;
          to[u + 1] += w * x.b;
        }
      }
    };
    int64_t c = 0;
    for (; c + kChains <= n; c += kChains)
#pragma GCC unroll 2
      for (int chain = 0; chain < kChains; ++chain) add(c + chain, acc[chain]);
    if (c < n) add(c, acc[0]);
#pragma GCC unroll 8
    for (int u = 0; u < N; ++u) store(sum + i + u * kWidth, kChains == 2 ? acc[0][u] + acc[kChains - 1][u] : acc[0][u]);
  }

  // All queries of one key head, over the visible keys [begin, end). state starts as zeros; query is (queries, padded).
  void keys_of(int64_t b, int64_t kv, const Keys<T>& keys, int64_t begin, int64_t end, const float* query,
               float* state) const {
    const int64_t group = p.h / p.hkv, queries = group * p.sq;
    const T *key = p.key.at(b, kv, 0), *value = p.value.at(b, kv, 0);
    float s[kTile];
    for (int64_t c0 = begin; c0 < end; c0 += kTile)
      for (int64_t r = 0; r < queries; ++r) {
        const int64_t head = kv * group + r / p.sq, i = r % p.sq;
        int64_t last = keys.seen_by(p, i);
        last = last < end ? last : end;
        const int64_t n = last - c0 < kTile ? last - c0 : kTile;
        if (n <= 0) continue;
        const int32_t* position = keys.position + c0;
        vfloat top = splat(-INFINITY);
        for (int64_t c = 0; c < n; c += kWidth) {
          const T* row[kWidth];
          for (int u = 0; u < kWidth; ++u) row[u] = key + position[c + u < n ? c + u : n - 1] * p.key.row;
          if (kAhead && r == 0 && c0 + c + 2 * kWidth <= end)
            for (int u = 0; u < kWidth; ++u)
              for (int64_t at = 0; at < p.d; at += 64 / (int64_t)sizeof(T)) {
                __builtin_prefetch(key + position[c + kWidth + u] * p.key.row + at);
                if (sizeof(T) == 4) __builtin_prefetch(value + position[c + u] * p.value.row + at, 0, 2);
              }
          vfloat x = scores(query + r * padded(), row);
          if (p.bias) {
            const T* at = p.bias + b * p.bias_stride[0] + head * p.bias_stride[1] + i * p.bias_stride[2];
            for (int u = 0; u < kWidth; ++u)
              x[u] += load_one(at + position[c + u < n ? c + u : n - 1] * p.bias_stride[3]);
          }
          if (p.relative.rows) {
            const int64_t query_at = i + p.sk - p.sq;
            if (n - c >= kWidth && position[c + kWidth - 1] - position[c] == kWidth - 1)
              x += load(p.relative.at(head, position[c] - query_at));
            else
              for (int u = 0; u < kWidth; ++u) x[u] += *p.relative.at(head, position[c + u < n ? c + u : n - 1] - query_at);
          }
          if (n - c < kWidth) x = lane_numbers() < (vint{} + (int32_t)(n - c)) ? x : splat(-INFINITY);
          store(s + c, x);
          top = max(top, x);
        }
        float* own = state + r * state_size();
        const float before = own[0], found = max_lanes(top), now = before > found ? before : found;
        const float safe = now == -INFINITY ? 0 : now;
        const float factor = exp_below_88(splat(before - safe))[0];
        vfloat total{};
        for (int64_t c = 0; c < n; c += kWidth) {
          const vfloat e = exp_below_88(load(s + c) - safe);
          store(s + c, e);
          total += e;
        }
        own[0] = now, own[1] = own[1] * factor + sum_lanes(total);
        int64_t k = 0;
        for (; k + 8 * kWidth <= p.d; k += 8 * kWidth) add_values<8>(own + 2, factor, s, value, position, n, k);
        for (; k + 4 * kWidth <= p.d; k += 4 * kWidth) add_values<4>(own + 2, factor, s, value, position, n, k);
        for (; k + 2 * kWidth <= p.d; k += 2 * kWidth) add_values<2>(own + 2, factor, s, value, position, n, k);
        for (; k < p.d; k += kWidth) add_values<1>(own + 2, factor, s, value, position, n, k);
      }
  }

  void finish(int64_t b, int64_t kv, float* state, int64_t splits) const {
    const int64_t group = p.h / p.hkv, queries = group * p.sq, size = state_size();
    for (int64_t r = 0; r < queries; ++r) {
      const int64_t head = kv * group + r / p.sq, i = r % p.sq;
      float* own = state + r * size;
      for (int64_t t = 1; t < splits; ++t) {
        const float* other = own + t * queries * size;
        const float now = own[0] > other[0] ? own[0] : other[0], safe = now == -INFINITY ? 0 : now;
        const float mine = exp_below_88(splat(own[0] - safe))[0], theirs = exp_below_88(splat(other[0] - safe))[0];
        own[0] = now;
        for (int64_t k = 1; k < size; ++k) own[k] = own[k] * mine + other[k] * theirs;
      }
      const float factor = own[1] == 0 ? 0 : 1 / own[1];
      O* to = out + ((b * p.sq + i) * p.h + head) * p.d;
      auto mean = [&](int64_t k) { return own[1] == 0 ? vfloat{} : load(own + 2 + k) * factor; };
      int64_t k = 0;
      for (; k + kPairStep <= p.d; k += kPairStep) {
        const Pair x = in_order<T>({mean(k), mean(k + kWidth)});
        store(to + k, x.a);
        store(to + k + kWidth, x.b);
      }
      for (; k < p.d; k += kWidth) {
        const vfloat x = mean(k);
        if (p.d - k >= kWidth) store(to + k, x);
        else store_partial(to + k, x, p.d - k);
      }
      if (lse) lse[(b * p.h + head) * p.sq + i] = own[1] == 0 ? INFINITY : own[0] + std::log(own[1]);
    }
  }

  void run() const {
    const int64_t heads = p.b * p.hkv, group = p.h / p.hkv, queries = group * p.sq, size = state_size();
    const int64_t most = p.sk / kLeastSplit > 1 ? p.sk / kLeastSplit : 1;
    const int threads = threads_for(heads * most, 4 * queries * (p.sk < kLeastSplit ? p.sk : kLeastSplit) * p.d);
    int64_t splits = (threads + heads - 1) / heads;
    splits = splits < most ? splits : most;
    float* states = floats(heads * splits * queries * size);
    parallel_chunks(threads < heads * splits ? threads : (int)(heads * splits), heads * splits,
                    [&](int, int64_t first, int64_t last) {
      Keys<T> keys;
      float* query = floats(queries * padded());
      for (int64_t item = first; item < last; ++item) {
        const int64_t b = item / splits / p.hkv, kv = item / splits % p.hkv, split = item % splits;
        keys.list(p, b);
        for (int64_t r = 0; r < queries; ++r) {
          const T* from = p.query.at(b, kv * group + r / p.sq, r % p.sq);
          take(from, p.d, p.scale, query + r * padded());
        }
        float* state = states + item * queries * size;
        for (int64_t i = 0; i < queries * size; ++i) state[i] = i % size ? 0 : -INFINITY;
        keys_of(b, kv, keys, keys.count * split / splits, keys.count * (split + 1) / splits, query, state);
        if (splits == 1) finish(b, kv, state, 1);
      }
      std::free(query);
      keys.release();
    });
    if (splits > 1)
      for (int64_t n = 0; n < heads; ++n) finish(n / p.hkv, n % p.hkv, states + n * splits * queries * size, splits);
    std::free(states);
  }
};

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
