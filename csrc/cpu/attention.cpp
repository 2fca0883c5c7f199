// attention's forward on the CPU: out = softmax(scale * query key^T + biases) value, with dropout, in O(S) memory.
//
// An online softmax (Dao et al. 2022) takes a tile of keys at a time. It keeps each query's highest score and sum of
// exponentials. Work: 4 Sq Sk D operations and Sq Sk exponentials, half of both under causality, because keys that a
// group of queries cannot see are neither computed nor read. On one AVX2 core the products alone reach 100 GFLOP/s.
#include "attention_few.h"
#include "attention_tile.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Keys in a tile. The tile's scores and value rows fit in L1 together. The count is a multiple of kRows, and from 48 on a
// multiple of 24, so that two tiles share few cache lines of a bias.
inline int64_t tile_keys(int64_t d) {
  const int64_t n = 4608 / d / kRows * kRows;
  if (n < 8 * kRows) return n < 2 * kRows ? 2 * kRows : n;
  return n < 12 * kRows ? 8 * kRows : 12 * kRows;
}

// Groups of queries that use a tile of keys before the next one. The tile comes from memory once for all of them.
constexpr int kBlock = 4;

template <class T> struct Forward {
  Problem<T> p;
  T* out;      // (B, Sq, H, D)
  float* lse;  // (B, H, Sq) or null

  // The running state of a group of queries from tile to tile of keys. query and sum are (d, kGroup).
  struct State {
    Group<T> group;
    float *query, *sum;
    vfloat highest[2], total[2];
  };

  void begin(State& g) const {
    to_lanes(p.query.at(g.group.b, g.group.h, g.group.first), p.query.row, g.group.rows, p.d, g.query, kGroup);
    for (int64_t i = 0; i < p.d * kGroup; i += kWidth) store(g.sum + i, vfloat{});
    for (int v = 0; v < 2; ++v) g.highest[v] = splat(-INFINITY), g.total[v] = vfloat{};
  }

  // Keys c0 .. c0 + n - 1; s is scratch for their scores, (n, kGroup).
  void tile(State& g, const Keys<T>& keys, int64_t c0, int64_t n, float* s) const {
    if (p.bias) g.group.prefetch_bias(p, keys, c0, n);
    const float* plus[12 * kRows];
    dots(n, keys.key + c0 * keys.key_step, keys.key_step, g.query, kGroup, p.d, s, kGroup, splat(p.scale),
         g.group.relative(p, keys, c0, n, plus));
    g.group.finish_scores(p, keys, c0, n, s, kGroup);
    vfloat factor[2];
    for (int v = 0; v < 2; ++v) {
      float* at = s + v * kWidth;
      vfloat m[4] = {g.highest[v], g.highest[v], g.highest[v], g.highest[v]};  // four chains hide the latency of max
      int64_t c = 0;
      for (; c + 4 <= n; c += 4)
        for (int u = 0; u < 4; ++u) m[u] = max(m[u], load(at + (c + u) * kGroup));
      for (; c < n; ++c) m[0] = max(m[0], load(at + c * kGroup));
      const vfloat now = max(max(m[0], m[1]), max(m[2], m[3]));
      const vfloat safe = now == splat(-INFINITY) ? vfloat{} : now;  // -inf - -inf would be NaN
      factor[v] = exp_below_88(g.highest[v] - safe);
      g.highest[v] = now;
      vfloat t{};
      for (c = 0; c < n; ++c) {
        const vfloat e = exp_below_88(load(at + c * kGroup) - safe);
        store(at + c * kGroup, e);
        t += e;
      }
      g.total[v] = g.total[v] * factor[v] + t;
    }
    if (p.dropout)
      g.group.dropout(p, keys, c0, n, [&](int64_t c, int v, vint kept) {
        float* at = s + c * kGroup + v * kWidth;
        store(at, kept ? load(at) : vfloat{});
      });
    const float* value = keys.value + c0 * keys.value_step;
    products<false, kScaled>(p.d, value, keys.value_step, s, kGroup, n, g.sum, kGroup, factor);
  }

  void end(State& g) const {
    const int64_t b = g.group.b, h = g.group.h, first = g.group.first;
    vfloat factor[2];
    for (int v = 0; v < 2; ++v)
      factor[v] = g.total[v] == vfloat{} ? vfloat{} : (p.dropout ? p.keep_scale : 1.0f) / g.total[v];
    from_lanes(g.sum, factor, out + (p.token(b, first) * p.h + h) * p.d, p.h * p.d, g.group.rows, p.d);
    if (!lse) return;
    for (int64_t i = 0; i < g.group.rows; ++i) {
      const float m = g.highest[i / kWidth][i % kWidth], l = g.total[i / kWidth][i % kWidth];
      lse[p.row(b, h, first + i)] = l == 0 ? INFINITY : m + std::log(l);  // NaN if a score is: max() may drop it
    }
  }

  // Items are blocks of queries; heads that share keys are side by side. Each thread's share has about the same number
  // of visible scores. Under causality that is not the same number of blocks.
  void run() const {
    constexpr int64_t block = kBlock * kGroup;
    const int64_t per_head = (p.longest + block - 1) / block, items = p.b * p.h * per_head, step = tile_keys(p.d);
    const int64_t most_keys = p.starts ? p.longest : p.sk;
    const int threads = threads_for(items, 4 * (p.longest < block ? p.longest : block) * most_keys * p.d);
    parallel_chunks(threads, threads, [&](int, int64_t first_share, int64_t last_share) {
      Keys<T> keys;
      auto cost = [&](int64_t item) {
        const int64_t b = item / per_head / p.h, first = p.first_query(b) + item % per_head * block, end = p.end_query(b);
        if (first >= end) return int64_t{0};
        keys.list(p, b);
        return kRows + keys.seen_by(p, first + block < end ? first + block - 1 : end - 1);
      };
      const int64_t first_item = share_begin(first_share, threads, items, cost);
      const int64_t last_item = share_begin(last_share, threads, items, cost);
      float* scratch = floats(kGroup * (step + 2 * p.d * kBlock));
      State states[kBlock];
      for (int64_t item = first_item; item < last_item; ++item) {
        const int64_t b = item / per_head / p.h, h = item / per_head % p.h, past = p.end_query(b);
        const int64_t first = p.first_query(b) + item % per_head * block;
        if (first >= past) continue;
        keys.list(p, b);
        int groups = 0;
        for (int64_t i = first; i < past && groups < kBlock; i += kGroup, ++groups) {
          float* own = scratch + kGroup * (step + 2 * p.d * groups);
          states[groups] = {Group<T>(p, keys, b, h, i), own, own + p.d * kGroup, {}, {}};
          begin(states[groups]);
        }
        const int64_t most = states[groups - 1].group.most;
        keys.rows(p, b, h * p.hkv / p.h, most);
        for (int64_t c0 = 0; c0 < most; c0 += step)
          for (int g = 0; g < groups; ++g) {
            const int64_t left = states[g].group.most - c0;
            if (left > 0) tile(states[g], keys, c0, left < step ? left : step, scratch);
          }
        for (int g = 0; g < groups; ++g) end(states[g]);
      }
      std::free(scratch);
      keys.release();
    });
  }
};

}  // namespace

void attention_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets, addr seed,
                       addr starts, addr out, addr lse, addr layout, int dtype) {
  const auto& n = *(const AttentionLayout*)layout;
  PYFUSED_BY_DTYPE(dtype, {
    Problem<T> p(query, key, value, mask, bias, seed, starts, n);
    if (p.no_queries()) return;
    const bool few = Few<T>::fits(p);
    p.with_relative(table, buckets, n, few ? 1 : -1, few ? kWidth : kGroup);
    if (few) Few<T>{p, (T*)out, (float*)lse}.run();
    else Forward<T>{p, (T*)out, (float*)lse}.run();
    p.release();
  })
}

}  // namespace pyfused::PYFUSED_ISA
