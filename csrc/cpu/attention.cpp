// attention's forward on the CPU: out = softmax(scale * query key^T + bias) value, with dropout, in O(S) memory.
#include "attention_few.h"
#include "attention_tile.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Keys in a tile: scores and value rows of a tile stay in L1 together. A multiple of kRows.
inline int64_t tile_keys(int64_t d) {
  const int64_t n = 4608 / d / kRows * kRows;
  return n < 2 * kRows ? 2 * kRows : (n > 12 * kRows ? 12 * kRows : n);
}

template <class T> struct Forward {
  Problem<T> p;
  T* out;      // (B, Sq, H, D)
  float* lse;  // (B, H, Sq) or null

  // One group of queries over all the keys they see. Scratch: query and output (d, kGroup), scores (tile, kGroup).
  void group(const Group<T>& g, const Keys<T>& keys, float* query, float* sum, float* s) const {
    const int64_t d = p.d, tile = tile_keys(d);
    const vfloat scale = splat(p.scale * kLog2E);
    to_lanes(p.query.at(g.b, g.h, g.first), p.query.row, g.rows, d, query, kGroup);
    for (int64_t i = 0; i < d * kGroup; i += kWidth) store(sum + i, vfloat{});
    vfloat highest[2] = {splat(-INFINITY), splat(-INFINITY)}, total[2] = {};
    for (int64_t c0 = 0; c0 < g.most; c0 += tile) {
      const int64_t n = g.most - c0 < tile ? g.most - c0 : tile;
      dots(n, keys.key + c0 * keys.key_step, keys.key_step, query, kGroup, d, s, kGroup, scale);
      g.finish_scores(p, keys, c0, n, s, kGroup);
      vfloat factor[2];
      for (int v = 0; v < 2; ++v) {
        float* at = s + v * kWidth;
        vfloat m[4] = {highest[v], highest[v], highest[v], highest[v]};  // four chains hide the latency of max
        int64_t c = 0;
        for (; c + 4 <= n; c += 4)
          for (int u = 0; u < 4; ++u) m[u] = max(m[u], load(at + (c + u) * kGroup));
        for (; c < n; ++c) m[0] = max(m[0], load(at + c * kGroup));
        const vfloat now = max(max(m[0], m[1]), max(m[2], m[3]));
        const vfloat safe = now == splat(-INFINITY) ? vfloat{} : now;  // -inf - -inf would be NaN
        factor[v] = exp2(highest[v] - safe);
        highest[v] = now;
        vfloat t{};
        for (c = 0; c < n; ++c) {
          const vfloat e = exp2(load(at + c * kGroup) - safe);
          store(at + c * kGroup, e);
          t += e;
        }
        total[v] = total[v] * factor[v] + t;
      }
      if (p.dropout)
        g.dropout(p, keys, c0, n, [&](int64_t c, int v, vint kept) {
          float* at = s + c * kGroup + v * kWidth;
          store(at, kept ? load(at) : vfloat{});
        });
      products<false, kScaled>(d, keys.value + c0 * keys.value_step, keys.value_step, s, kGroup, n, sum, kGroup, factor);
    }
    vfloat factor[2];
    for (int v = 0; v < 2; ++v)
      factor[v] = total[v] == vfloat{} ? vfloat{} : (p.dropout ? p.keep_scale : 1.0f) / total[v];
    from_lanes(sum, factor, out + ((g.b * p.sq + g.first) * p.h + g.h) * d, p.h * d, g.rows, d);
    if (!lse) return;
    for (int64_t i = 0; i < g.rows; ++i) {
      const float m = highest[i / kWidth][i % kWidth], l = total[i / kWidth][i % kWidth];
      lse[(g.b * p.h + g.h) * p.sq + g.first + i] = m == -INFINITY ? INFINITY : m * kLn2 + std::log(l);
    }
  }

  // Items are groups of queries, those of the heads that share keys side by side; each share of the threads gets about
  // the same number of visible scores, which under causality is not the same number of groups.
  void run() const {
    const int64_t per_head = (p.sq + kGroup - 1) / kGroup, items = p.b * p.h * per_head;
    const int threads = threads_for(items, 4 * kGroup * p.sk * p.d);
    parallel_chunks(threads, threads, [&](int, int64_t first_share, int64_t last_share) {
      Keys<T> keys;
      auto cost = [&](int64_t item) {
        keys.list(p, item / per_head / p.h);
        const int64_t last = item % per_head * kGroup + kGroup - 1;
        return kRows + keys.seen_by(p, last < p.sq ? last : p.sq - 1);
      };
      const int64_t begin = share_begin(first_share, threads, items, cost);
      const int64_t end = share_begin(last_share, threads, items, cost);
      float* scratch = floats(kGroup * (2 * p.d + tile_keys(p.d)));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / per_head, b = head / p.h, h = head % p.h;
        keys.list(p, b);
        const Group<T> g(p, keys, b, h, item % per_head * kGroup);
        keys.rows(p, b, h * p.hkv / p.h, g.most);
        group(g, keys, scratch, scratch + kGroup * p.d, scratch + 2 * kGroup * p.d);
      }
      std::free(scratch);
      keys.release();
    });
  }
};

}  // namespace

void attention_forward(addr query, addr key, addr value, addr mask, addr bias, addr seed, addr out, addr lse,
                       addr layout, bool causal, double scale, double dropout_p, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    const Problem<T> p(query, key, value, mask, bias, seed, layout, causal, scale, dropout_p);
    const Forward<T> forward{p, (T*)out, (float*)lse};
    if (Few<T>::fits(p)) Few<T>{p, (T*)out, (float*)lse}.run();
    else forward.run();
  })
}

}  // namespace pyfused::PYFUSED_ISA
