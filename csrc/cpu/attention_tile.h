// What do attention's forward and backward share on the CPU? The visible keys, and the operations on tiles.
//
// QUERIES ARE IN THE LANES: a group of kGroup = 2 kWidth queries is transposed once to (D, kGroup), and a tile of scores
// is (keys, kGroup). Both products broadcast elements of key and value rows straight from memory (a key row per score
// row, a value element per output row). So nothing is packed into panels, and no D or number of keys needs padding. A
// softmax is lane-wise, without horizontal reductions. Hidden keys are not in the list of rows. Philox has one counter
// per query, so its counters are the lanes.
#pragma once

#include "attention_problem.h"
#include "pyfused/philox.h"

namespace pyfused::PYFUSED_ISA {
namespace {

constexpr int kGroup = 2 * kWidth;
constexpr int kRows = 6;  // 6 rows x 2 vectors: 12 accumulators, 2 operands and a broadcast fit 16 registers

// ---- vector helpers -------------------------------------------------------------------------------------------------

PYFUSED_INLINE vint lane_numbers() {
  vint v;
  for (int i = 0; i < kWidth; ++i) v[i] = i;
  return v;
}

// ---- products -------------------------------------------------------------------------------------------------------

// Computes the sum over k of A(r, k) B[k][lane] in registers, for R rows and V vectors of lanes. Then it stores
// kNew: C = sum * factor[0]; kAdd: C += sum * factor[0]; kScaled: C = C * (a factor for each lane) + sum;
// kPlus: C = sum * factor[0] + the lanes at plus[r].
// With kAlong A is contiguous along k, with `step` between rows. Otherwise it is contiguous along rows, `step` between k.
enum Finish { kNew, kAdd, kScaled, kPlus };
template <int R, int V, bool kAlong, Finish kFinish>
PYFUSED_INLINE void product(const float* a, int64_t step, const float* b, int64_t b_step, int64_t depth, float* c,
                            int64_t c_step, const vfloat* factor, const float* const* plus = nullptr) {
  vfloat acc[R][V] = {};
  const float* row[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) row[r] = a + r * step;
#pragma GCC unroll 4  // the loop's own instructions take slots of the multiply-adds: 3% to 6% with AVX-512
  for (int64_t k = 0; k < depth; ++k, b += b_step) {
    vfloat lanes[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) lanes[v] = load(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vfloat x = splat(kAlong ? row[r][k] : a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += x * lanes[v];
    }
    if (!kAlong) a += step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* at = c + r * c_step + v * kWidth;
      if (kFinish == kNew) store(at, acc[r][v] * factor[0]);
      if (kFinish == kAdd) store(at, load(at) + acc[r][v] * factor[0]);
      if (kFinish == kScaled) store(at, load(at) * factor[v] + acc[r][v]);
      if (kFinish == kPlus) store(at, acc[r][v] * factor[0] + load(plus[r] + v * kWidth));
    }
}

template <bool kAlong, Finish kFinish, int V = 2>
inline void products(int64_t rows, const float* a, int64_t step, const float* b, int64_t b_step, int64_t depth,
                     float* c, int64_t c_step, const vfloat* factor, const float* const* plus = nullptr) {
  const int64_t next = kAlong ? step : 1;
  for (; rows >= kRows; rows -= kRows, a += kRows * next, c += kRows * c_step) {
    product<kRows, V, kAlong, kFinish>(a, step, b, b_step, depth, c, c_step, factor, plus);
    if (kFinish == kPlus) plus += kRows;
  }
  switch (rows) {
    case 5: return product<5, V, kAlong, kFinish>(a, step, b, b_step, depth, c, c_step, factor, plus);
    case 4: return product<4, V, kAlong, kFinish>(a, step, b, b_step, depth, c, c_step, factor, plus);
    case 3: return product<3, V, kAlong, kFinish>(a, step, b, b_step, depth, c, c_step, factor, plus);
    case 2: return product<2, V, kAlong, kFinish>(a, step, b, b_step, depth, c, c_step, factor, plus);
    case 1: return product<1, V, kAlong, kFinish>(a, step, b, b_step, depth, c, c_step, factor, plus);
  }
}

// Sums are cut into chains, because the rounding error of a chain grows with its length.
constexpr int64_t kChain = 64;

// Dot products of key rows with the queries in the lanes, times factor, plus the lanes at plus[row] if plus is given.
inline void dots(int64_t rows, const float* a, int64_t step, const float* b, int64_t b_step, int64_t d, float* c,
                 int64_t c_step, vfloat factor, const float* const* plus = nullptr) {
  const int64_t first = d < kChain ? d : kChain;
  if (plus) products<true, kPlus>(rows, a, step, b, b_step, first, c, c_step, &factor, plus);
  else products<true, kNew>(rows, a, step, b, b_step, first, c, c_step, &factor);
  for (int64_t k = kChain; k < d; k += kChain) {
    const int64_t depth = d - k < kChain ? d - k : kChain;
    products<true, kAdd>(rows, a + k, step, b + k * b_step, b_step, depth, c, c_step, &factor);
  }
}

// ---- queries in and out of the lanes --------------------------------------------------------------------------------

// (rows, d) elements -> (d, step) floats; lanes past `rows` are zero.
template <class T>
inline void to_lanes(const T* from, int64_t row_step, int64_t rows, int64_t d, float* to, int64_t step) {
  for (int v = 0; v < 2; ++v)
    for (int64_t i = 0; i < d; i += kWidth) {
      vfloat t[kWidth];
      if constexpr (std::is_same_v<T, float>) {
        if (rows == kGroup && d - i >= kWidth) {
          load_transposed(from + v * kWidth * row_step + i, row_step, t);
#pragma GCC unroll 16
          for (int j = 0; j < kWidth; ++j) store(to + (i + j) * step + v * kWidth, t[j]);
          continue;
        }
      }
      if (rows == kGroup && d - i >= kWidth) {
#pragma GCC unroll 16
        for (int r = 0; r < kWidth; ++r) t[r] = load(from + (v * kWidth + r) * row_step + i);
      } else {
        for (int r = 0; r < kWidth; ++r) {
          const T* p = from + (v * kWidth + r) * row_step + i;
          t[r] = v * kWidth + r >= rows ? vfloat{} : (d - i >= kWidth ? load(p) : load_partial(p, d - i));
        }
      }
      transpose(t);
      const int64_t n = d - i < kWidth ? d - i : kWidth;
      for (int64_t j = 0; j < n; ++j) store(to + (i + j) * step + v * kWidth, t[j]);
    }
}

// (d, kGroup) floats, times a factor for each lane -> (rows, d) elements.
template <class T>
inline void from_lanes(const float* from, const vfloat* factor, T* to, int64_t row_step, int64_t rows, int64_t d) {
  for (int v = 0; v < 2; ++v)
    for (int64_t i = 0; i < d; i += kWidth) {
      vfloat t[kWidth];
      const int64_t n = d - i < kWidth ? d - i : kWidth;
      for (int64_t j = 0; j < kWidth; ++j) {
        vfloat x = j < n ? load(from + (i + j) * kGroup + v * kWidth) * factor[v] : vfloat{};
        t[j] = factor[v] == vfloat{} ? vfloat{} : x;  // a lane that saw no key is zero; 0 * x may be NaN
      }
      transpose(t);
      for (int r = 0; r < kWidth && v * kWidth + r < rows; ++r) {
        T* p = to + (v * kWidth + r) * row_step + i;
        if (n == kWidth) store(p, t[r]);
        else store_partial(p, t[r], n);
      }
    }
}

// Rows of T as contiguous rows of float.
template <class T> inline void widen_row(const T* from, int64_t d, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= d; i += kWidth) store(to + i, load(from + i));
  if (i < d) store_partial(to + i, load_partial(from + i, d - i), d - i);
}

// ---- the keys of one batch entry and key head -----------------------------------------------------------------------

// Only real keys are listed, so padding costs nothing and its key and value rows are never read.
template <class T> struct Keys {
  int32_t* position = nullptr;  // positions of the visible keys, ascending
  float *key_pack = nullptr, *value_pack = nullptr;
  int64_t count = 0, batch = -1, head = -1, packed = 0;
  const float *key = nullptr, *value = nullptr;  // rows of float, wherever they are
  int64_t key_step = 0, value_step = 0;
  bool direct = false;

  void list(const Problem<T>& p, int64_t b) {
    if (b == batch) return;
    if (!position) position = (int32_t*)floats(p.sk);
    batch = b, head = -1, count = 0;
    for (int64_t j = p.first_query(b), end = p.end_key(b); j < end; ++j) {
      position[count] = (int32_t)j;
      count += !p.mask || p.mask[b * p.sk + j];
    }
  }
  // Points key and value at rows of float. The tensors' own rows serve if they are float and one run without gaps; for
  // many queries they must also be dense enough for the TLB. Otherwise the first `needed` keys are copied.
  void rows(const Problem<T>& p, int64_t b, int64_t kv_head, int64_t needed) {
    list(p, b);
    if (kv_head != head) {
      head = kv_head, packed = 0;
      const bool run = count && position[count - 1] - position[0] == count - 1;
      const bool dense = p.key.row <= 2 * p.d && p.value.row <= 2 * p.d;
      direct = sizeof(T) == sizeof(float) && run && (dense || p.longest <= 4 * kGroup);
      if (direct) {
        key = (const float*)p.key.at(b, kv_head, position[0]), key_step = p.key.row;
        value = (const float*)p.value.at(b, kv_head, position[0]), value_step = p.value.row;
      } else {
        if (!key_pack) key_pack = floats(p.sk * p.d), value_pack = floats(p.sk * p.d);
        key = key_pack, value = value_pack, key_step = value_step = p.d;
      }
    }
    if (direct) return;
    for (; packed < needed; ++packed) {
      widen_row(p.key.at(b, kv_head, position[packed]), p.d, key_pack + packed * p.d);
      widen_row(p.value.at(b, kv_head, position[packed]), p.d, value_pack + packed * p.d);
    }
  }
  // How many of the visible keys query i sees.
  int64_t seen_by(const Problem<T>& p, int64_t i) const {
    if (!p.causal) return count;
    const int64_t last = i + p.sk - p.sq;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (position[middle] <= last) low = middle + 1;
      else high = middle;
    }
    return low;
  }
  void release() { std::free(position), std::free(key_pack), std::free(value_pack); }
};

// ---- a group of queries ---------------------------------------------------------------------------------------------

// Lanes of one group: queries first .. first + rows - 1 of head h.
template <class T> struct Group {
  int64_t b, h, first, rows, fewest, most;  // keys seen by the first and the last query
  vint seen[2];

  Group() = default;
  Group(const Problem<T>& p, const Keys<T>& keys, int64_t b, int64_t h, int64_t first) : b(b), h(h), first(first) {
    const int64_t left = p.end_query(b) - first;
    rows = left < kGroup ? left : kGroup;
    fewest = most = keys.count;
    if (!p.causal) return;
    fewest = keys.seen_by(p, first), most = keys.seen_by(p, first + rows - 1);
    for (int i = 0; i < kGroup; ++i)
      seen[i / kWidth][i % kWidth] = i < rows ? (int32_t)keys.seen_by(p, first + i) : 0;
  }

  // The addresses of T5's bias for the keys c0 .. c0 + n - 1. Null without T5's bias.
  const float* const* relative(const Problem<T>& p, const Keys<T>& keys, int64_t c0, int64_t n, const float** at) const {
    if (!p.relative.rows) return nullptr;
    for (int64_t c = 0; c < n; ++c) at[c] = p.relative.at(h, first + p.sk - p.sq - keys.position[c0 + c]);
    return at;
  }

  // Adds the bias to the scores of keys c0 .. c0 + n - 1, (n, step), and hides keys by causality.
  void finish_scores(const Problem<T>& p, const Keys<T>& keys, int64_t c0, int64_t n, float* s, int64_t step) const {
    if (p.bias) add_bias(p, keys, c0, n, s, step);
    if (!p.causal) return;
    const vfloat hidden = splat(-INFINITY);
    for (int64_t c = fewest > c0 ? fewest : c0; c < c0 + n; ++c)
      for (int v = 0; v < 2; ++v) {
        float* at = s + (c - c0) * step + v * kWidth;
        store(at, (vint{} + (int32_t)c) < seen[v] ? load(at) : hidden);
      }
  }

  // The bias is read once, in short pieces of many rows. No hardware prefetcher follows that.
  void prefetch_bias(const Problem<T>& p, const Keys<T>& keys, int64_t c0, int64_t n) const {
    if (p.bias_stride[3] != 1 || !p.bias_stride[2]) return;
    const T* base = p.bias + b * p.bias_stride[0] + h * p.bias_stride[1] + keys.position[c0];
    for (int64_t i = first; i < first + rows; ++i)
      for (int64_t j = 0; j < n; j += 64 / (int64_t)sizeof(T)) __builtin_prefetch(base + i * p.bias_stride[2] + j);
  }

  void add_bias(const Problem<T>& p, const Keys<T>& keys, int64_t c0, int64_t n, float* s, int64_t step) const {
    const int64_t sj = p.bias_stride[3];
    const T* row[kGroup];  // lanes past the last query read its row
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t query = first + (i < rows ? i : rows - 1);
      row[i] = p.bias + b * p.bias_stride[0] + h * p.bias_stride[1] + query * p.bias_stride[2];
    }
    for (int64_t c = 0; c < n; c += kWidth) {
      // The last keys of a tile are too few for a square, so it includes some earlier keys. Those have their bias already.
      const int64_t begin = n - c < kWidth && n >= kWidth ? n - kWidth : c, done = c - begin;
      const int64_t m = n - begin < kWidth ? n - begin : kWidth;
      const int32_t* j = keys.position + c0 + begin;
      const bool run = m == kWidth && sj == 1 && j[m - 1] - j[0] == m - 1;
      for (int v = 0; v < 2; ++v) {
        float* at = s + begin * step + v * kWidth;
        if (run) {  // a square of the bias, kept in registers
          vfloat t[kWidth];
#pragma GCC unroll 16
          for (int r = 0; r < kWidth; ++r) t[r] = load(row[v * kWidth + r] + j[0]);
          transpose(t);
#pragma GCC unroll 16
          for (int k = 0; k < kWidth; ++k)
            if (k >= done) store(at + k * step, load(at + k * step) + t[k]);
        } else {
          for (int64_t k = done; k < m; ++k) {
            float lanes[kWidth];
            for (int r = 0; r < kWidth; ++r) lanes[r] = load_one(row[v * kWidth + r] + j[k] * sj);
            store(at + k * step, load(at + k * step) + load(lanes));
          }
        }
      }
    }
  }

  // Calls body(key of the tile, vector of the group, lanes kept); a kept lane is all ones, a dropped one all zeros. The
  // generator counts queries and keys from the batch entry's first.
  template <class Body>
  void dropout(const Problem<T>& p, const Keys<T>& keys, int64_t c0, int64_t n, const Body& body) const {
    const Philox philox{p.seed[0], p.seed[1]};
    const vuint lanes = bits_as<vuint>(lane_numbers()) + (uint32_t)(first - p.first_query(b));
    vuint words[2][4];
    for (int64_t c = 0, quad = -1; c < n; ++c) {
      const int64_t j = keys.position[c0 + c] - p.first_query(b);
      if (j >> 2 != quad) {
        quad = j >> 2;
        for (int v = 0; v < 2; ++v)
          philox((uint32_t)quad, lanes + (uint32_t)(v * kWidth), (uint32_t)(b * p.h + h), words[v]);
      }
      for (int v = 0; v < 2; ++v) body(c, v, words[v][j & 3] >= p.threshold);
    }
  }
};

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
