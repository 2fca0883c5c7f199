// attention's backward on the CPU: the gradients of query, key, value and both biases, in O(S) memory.
//
//   P = exp(S - lse), recomputed tile by tile;  M = dropout's mask / (1 - p);  delta = rowsum(grad_out * out)
//   dV = (P M)^T grad_out;  dS = P (M (grad_out V^T) - delta);  dQ = scale dS K;  dK = scale dS^T Q;  dbias = dS
// Float rounds lse by up to |lse| 2^-24, an error that all P of a row share. Behind a bias of -1e9 it loses the sum, and P
// would be 1 for each key. Groups of queries with such rows take another pass: P = exp(S - highest) / sum.
// The gradient of T5's table sums dS by distance, in float for a block of queries, then in double, then by bucket.
//
// Five products of 2 Sq Sk D operations each; the forward has two. An item is a key head. One thread sums its dK and dV
// over the query heads of its group, in order. If there are fewer items than threads, an item's queries are split into
// parts, and the parts are summed in order. So results repeat for a given number of threads, without atomics.
#include "attention_tile.h"

namespace pyfused::PYFUSED_ISA {
namespace {

constexpr int kBlockGroups = 64 / kGroup < 1 ? 1 : 64 / kGroup;  // a block is the depth of the products for dK and dV
constexpr int kBlockQueries = kBlockGroups * kGroup;
constexpr int64_t kTileKeys = 8 * kRows;

template <class T> struct Backward {
  Problem<T> p;
  Strided<const T> out, grad_out;
  const float* lse;
  T *grad_query, *grad_key, *grad_value, *grad_bias;
  float* grad_table;  // (num_buckets, H) or null

  int64_t most_keys() const { return p.starts ? p.longest : p.sk; }
  // Row-major blocks are padded to whole vectors.
  int64_t width() const { return (p.d + kWidth - 1) / kWidth * kWidth; }

  struct Scratch {
    float *query_lanes, *grad_out_lanes, *grad_query_lanes;  // (d, kGroup) for each group of the block
    float *query_rows, *grad_out_rows;                       // (kBlockQueries, width)
    float *weights, *grad_scores;                            // (kTileKeys, kBlockQueries)
    float* distances;                                        // sums of one block, laid out like a row of p.relative
    float* base;

    explicit Scratch(const Backward& f) {
      const int64_t lanes = f.p.d * kBlockQueries, rows = f.width() * kBlockQueries, tile = kTileKeys * kBlockQueries;
      base = floats(3 * lanes + 2 * rows + 2 * tile + f.p.relative.length);
      query_lanes = base, grad_out_lanes = query_lanes + lanes, grad_query_lanes = grad_out_lanes + lanes;
      query_rows = grad_query_lanes + lanes, grad_out_rows = query_rows + rows;
      weights = grad_out_rows + rows, grad_scores = weights + tile;
      distances = grad_scores + tile;
    }
  };

  // The largest |lse| that serves. For float it is an error of P of 2^-18, as large as that of scores of this size; scores of few
  // products are more exact. For the others it is 2^-13, a quarter of the rounding step of half precision or less.
  float serves() const { return sizeof(T) < sizeof(float) ? 2048.0f : p.d > 16 ? 64.0f : 4.0f; }

  // Whether a group has a row with a larger one. That of a blind query is infinite.
  bool is_far(const vfloat* row_lse) const {
    for (int64_t i = 0; i < kGroup; ++i) {
      const float x = std::abs(row_lse[i / kWidth][i % kWidth]);
      if (x > serves() && x < INFINITY) return true;
    }
    return false;
  }

  // Makes each row's shift its highest score, and its factor 1 / sum of exp(S - shift). s is scratch for a tile's scores.
  void softmax_again(const Group<T>& g, const Keys<T>& keys, const float* query_lanes, float* s, vfloat* shift,
                     vfloat* factor) const {
    vfloat highest[2] = {splat(-INFINITY), splat(-INFINITY)}, total[2] = {};
    for (int64_t c0 = 0; c0 < g.most; c0 += kTileKeys) {
      const int64_t n = g.most - c0 < kTileKeys ? g.most - c0 : kTileKeys;
      const float* plus[kTileKeys];
      dots(n, keys.key + c0 * keys.key_step, keys.key_step, query_lanes, kGroup, p.d, s, kGroup, splat(p.scale),
           g.relative(p, keys, c0, n, plus));
      g.finish_scores(p, keys, c0, n, s, kGroup);
      for (int v = 0; v < 2; ++v) {
        vfloat now = highest[v], sum{};
        for (int64_t c = 0; c < n; ++c) now = max(now, load(s + c * kGroup + v * kWidth));
        const vfloat safe = now == splat(-INFINITY) ? vfloat{} : now;  // -inf - -inf would be NaN
        for (int64_t c = 0; c < n; ++c) sum += exp_below_88(load(s + c * kGroup + v * kWidth) - safe);
        total[v] = total[v] * exp_below_88(highest[v] - safe) + sum;
        highest[v] = now;
      }
    }
    for (int v = 0; v < 2; ++v) {
      const vint sees = shift[v] < splat(INFINITY);  // blind queries keep +inf, and P = 0
      shift[v] = sees ? highest[v] : shift[v];
      factor[v] = sees ? 1.0f / total[v] : splat(1.0f);
    }
  }

  // A blind query saw no key. Its rows may hold anything, even NaN, and count as zeros.
  static bool is_blind(const vfloat* row_lse, int64_t i) { return row_lse[i / kWidth][i % kWidth] == INFINITY; }

  // rows of T -> (kBlockQueries, width) floats. Padding and the rows of blind queries are zeros.
  void copy_rows(const Strided<const T>& from, int64_t b, int64_t h, int64_t first, int64_t rows, const vfloat* row_lse,
                 float* to) const {
    for (int64_t i = 0; i < kBlockQueries; ++i, to += width()) {
      const bool none = i >= rows || is_blind(row_lse, i);
      const T* row = from.at(b, h, first + i);
      for (int64_t k = 0; k < p.d; k += kWidth)
        store(to + k, none ? vfloat{} : (p.d - k >= kWidth ? load(row + k) : load_partial(row + k, p.d - k)));
    }
  }

  // The same for one group's lanes, (d, kGroup).
  void clear_blind(const vfloat* row_lse, int64_t rows, float* lanes) const {
    for (int64_t i = 0; i < rows; ++i)
      if (is_blind(row_lse, i))
        for (int64_t k = 0; k < p.d; ++k) lanes[k * kGroup + i] = 0;
  }

  // delta in the lanes, summed in the order of dots(). A query with one visible key has out = value, so delta then
  // equals grad_out value^T to the last bit, and the gradient of its score is exactly zero.
  void deltas(const float* grad_out_lanes, const float* out_lanes, vfloat* delta) const {
    for (int v = 0; v < 2; ++v) {
      vfloat total{};
      for (int64_t k = 0; k < p.d; k += kChain) {
        vfloat sum{};
        for (int64_t i = k; i < p.d && i < k + kChain; ++i)
          sum += load(out_lanes + i * kGroup + v * kWidth) * load(grad_out_lanes + i * kGroup + v * kWidth);
        total = k ? total + sum : sum;
      }
      delta[v] = total;
    }
  }

  // C (rows, width) += factor * A (rows, depth) B (depth, width). A has a tile's layout.
  void add_rows(int64_t rows, const float* a, const float* b, int64_t depth, float* c, float factor) const {
    const vfloat f = splat(factor);
    int64_t k = 0;
    for (; k + kGroup <= width(); k += kGroup)
      products<true, kAdd>(rows, a, kBlockQueries, b + k, width(), depth, c + k, width(), &f);
    if (k < width()) products<true, kAdd, 1>(rows, a, kBlockQueries, b + k, width(), depth, c + k, width(), &f);
  }

  // One block of queries of one head against all the keys it sees.
  void block(const Keys<T>& keys, const Scratch& x, int64_t b, int64_t h, int64_t first, float* dk, float* dv,
             double* by_distance) const {
    const int64_t left = p.end_query(b) - first, rows = left < kBlockQueries ? left : kBlockQueries;
    const int groups = (int)((rows + kGroup - 1) / kGroup);
    const int64_t lanes = p.d * kGroup;
    Group<T> group[kBlockGroups];
    vfloat row_lse[kBlockQueries / kWidth], row_factor[kBlockQueries / kWidth], row_delta[kBlockQueries / kWidth];
    for (int64_t i = 0; i < groups * kGroup; ++i)
      row_lse[i / kWidth][i % kWidth] = i < rows ? lse[p.row(b, h, first + i)] : INFINITY;
    for (int g = 0; g < groups; ++g) {
      const int64_t i = first + g * kGroup;
      group[g] = Group<T>(p, keys, b, h, i);
      to_lanes(p.query.at(b, h, i), p.query.row, group[g].rows, p.d, x.query_lanes + g * lanes, kGroup);
      to_lanes(grad_out.at(b, h, i), grad_out.row, group[g].rows, p.d, x.grad_out_lanes + g * lanes, kGroup);
      clear_blind(row_lse + 2 * g, group[g].rows, x.query_lanes + g * lanes);
      clear_blind(row_lse + 2 * g, group[g].rows, x.grad_out_lanes + g * lanes);
      float* out_lanes = x.grad_query_lanes + g * lanes;  // grad_query_lanes is still free
      to_lanes(out.at(b, h, i), out.row, group[g].rows, p.d, out_lanes, kGroup);
      deltas(x.grad_out_lanes + g * lanes, out_lanes, row_delta + 2 * g);
      row_factor[2 * g] = row_factor[2 * g + 1] = splat(1.0f);
      if (is_far(row_lse + 2 * g))
        softmax_again(group[g], keys, x.query_lanes + g * lanes, x.weights, row_lse + 2 * g, row_factor + 2 * g);
    }
    for (int64_t i = 0; i < groups * lanes; i += kWidth) store(x.grad_query_lanes + i, vfloat{});
    copy_rows(p.query, b, h, first, rows, row_lse, x.query_rows);
    copy_rows(grad_out, b, h, first, rows, row_lse, x.grad_out_rows);

    const vfloat one = splat(1.0f);
    const int64_t most = group[groups - 1].most;
    for (int64_t c0 = 0; c0 < most; c0 += kTileKeys) {
      const int64_t n = most - c0 < kTileKeys ? most - c0 : kTileKeys;
      const float *key = keys.key + c0 * keys.key_step, *value = keys.value + c0 * keys.value_step;
      int begin = 0;  // the first group of the block that sees a key of this tile
      while (group[begin].most <= c0) ++begin;
      for (int g = begin; g < groups; ++g) {
        float *w = x.weights + g * kGroup, *ds = x.grad_scores + g * kGroup;
        const int64_t seen = group[g].most - c0 < n ? group[g].most - c0 : n;
        const float* plus[kTileKeys];
        dots(seen, key, keys.key_step, x.query_lanes + g * lanes, kGroup, p.d, w, kBlockQueries, splat(p.scale),
             group[g].relative(p, keys, c0, seen, plus));
        group[g].finish_scores(p, keys, c0, seen, w, kBlockQueries);
        dots(seen, value, keys.value_step, x.grad_out_lanes + g * lanes, kGroup, p.d, ds, kBlockQueries, one);
        gradient_of_scores(group[g], keys, c0, seen, w, ds, row_lse + 2 * g, row_factor + 2 * g, row_delta + 2 * g);
        for (int64_t c = seen; c < n; ++c)
          for (int v = 0; v < 2; ++v)
            store(w + c * kBlockQueries + v * kWidth, vfloat{}), store(ds + c * kBlockQueries + v * kWidth, vfloat{});
        if (by_distance) add_distances(group[g], keys, c0, seen, ds, x.distances);
        float* grad = x.grad_query_lanes + g * lanes;
        products<false, kAdd>(p.d, key, keys.key_step, ds, kBlockQueries, seen, grad, kGroup, &one);
      }
      const int64_t skip = begin * kGroup, depth = groups * kGroup - skip;
      add_rows(n, x.weights + skip, x.grad_out_rows + skip * width(), depth, dv + c0 * width(), 1.0f);
      add_rows(n, x.grad_scores + skip, x.query_rows + skip * width(), depth, dk + c0 * width(), p.scale);
      if (grad_bias) store_bias(keys, b, h, first, rows, skip, c0, n, x.grad_scores);
    }
    if (by_distance)
      for (int64_t i = 0; i < p.relative.length; ++i) by_distance[i] += x.distances[i], x.distances[i] = 0;
    const vfloat scale[2] = {splat(p.scale), splat(p.scale)};
    for (int g = 0; g < groups; ++g) {
      const int64_t i = first + g * kGroup;
      from_lanes(x.grad_query_lanes + g * lanes, scale, grad_query + (p.token(b, i) * p.h + h) * p.d, p.h * p.d,
                 group[g].rows, p.d);
    }
  }

  // w: scores -> dropped-out probabilities; ds: grad_out value^T -> the gradient of the scores.
  void gradient_of_scores(const Group<T>& g, const Keys<T>& keys, int64_t c0, int64_t n, float* w, float* ds,
                          const vfloat* row_lse, const vfloat* row_factor, const vfloat* row_delta) const {
    const bool alone = keys.count == 1;  // the softmax of one score is exactly 1; exp(s - lse) has a rounding error
    auto each = [&](int64_t c, int v, auto mask) {
      float *pw = w + c * kBlockQueries + v * kWidth, *ps = ds + c * kBlockQueries + v * kWidth;
      const vfloat unseen = row_lse[v] < splat(INFINITY) ? vfloat{} : splat(-INFINITY);
      const vfloat e = exp_below_88(alone ? unseen : load(pw) - row_lse[v]) * row_factor[v];
      store(ps, e * (mask(load(ps)) - row_delta[v]));
      store(pw, mask(e));
    };
    if (p.dropout)
      g.dropout(p, keys, c0, n, [&](int64_t c, int v, vint kept) {
        each(c, v, [&](vfloat y) { return kept ? y * p.keep_scale : vfloat{}; });
      });
    else
      for (int64_t c = 0; c < n; ++c)
        for (int v = 0; v < 2; ++v) each(c, v, [](vfloat y) { return y; });
  }

  void add_distances(const Group<T>& g, const Keys<T>& keys, int64_t c0, int64_t n, const float* ds, float* sum) const {
    for (int64_t c = 0; c < n; ++c, ds += kBlockQueries) {
      float* to = sum + p.relative.offset(g.first + p.sk - p.sq - keys.position[c0 + c]);
      const vfloat low = load(to) + load(ds), high = load(to + kWidth) + load(ds + kWidth);
      store(to, low), store(to + kWidth, high);
    }
  }

  void store_bias(const Keys<T>& keys, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t skip, int64_t c0,
                  int64_t n, const float* ds) const {
    for (int64_t i = skip; i < rows; ++i) {
      T* to = grad_bias + ((b * p.h + h) * p.sq + first + i) * p.sk;
      for (int64_t c = 0; c < n; ++c) store_one(to + keys.position[c0 + c], ds[c * kBlockQueries + i]);
    }
  }

  // Sums the parts and scatters the visible keys' rows; hidden keys have zero gradient.
  void finish(const Keys<T>& keys, int64_t b, int64_t kv, float* sums, int64_t parts) const {
    const int64_t size = most_keys() * width(), first = p.first_query(b), end = p.end_key(b);
    for (int which = 0; which < 2; ++which) {
      float* sum = sums + which * size;
      for (int64_t t = 1; t < parts; ++t)
        for (int64_t i = 0; i < keys.count * width(); i += kWidth)
          store(sum + i, load(sum + i) + load(sum + 2 * t * size + i));
      T* to = (which ? grad_value : grad_key) + ((p.starts ? first : b * p.sk) * p.hkv + kv) * p.d;
      for (int64_t j = first, c = 0; j < end; ++j, to += p.hkv * p.d) {
        const bool visible = c < keys.count && keys.position[c] == j;
        for (int64_t k = 0; k < p.d; k += kWidth) {
          const vfloat v = visible ? load(sum + c * width() + k) : vfloat{};
          if (p.d - k >= kWidth) store(to + k, v);
          else store_partial(to + k, v, p.d - k);
        }
        c += visible;
      }
    }
  }

  void run() const {
    const int64_t group = p.h / p.hkv, heads = p.b * p.hkv, per_head = (p.longest + kBlockQueries - 1) / kBlockQueries;
    const int64_t blocks = group * per_head, size = 2 * most_keys() * width();
    const int64_t queries = p.longest < kBlockQueries ? p.longest : kBlockQueries;
    const int threads = threads_for(heads * blocks, 10 * queries * most_keys() * p.d);
    const int64_t most = (threads + heads - 1) / heads, parts = most < blocks ? most : blocks;
    float* partial = parts > 1 ? floats(heads * parts * size) : nullptr;
    const int64_t reach = p.relative.length;
    double* distances = grad_table ? (double*)floats(2 * heads * parts * group * reach) : nullptr;
    parallel_chunks(threads < heads * parts ? threads : (int)(heads * parts), heads * parts,
                    [&](int, int64_t begin, int64_t end) {
      Keys<T> keys;
      Scratch scratch(*this);
      float* own = partial ? nullptr : floats(size);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / parts / p.hkv, kv = item / parts % p.hkv, end = p.end_query(b);
        auto first_of = [&](int64_t n) { return p.first_query(b) + n % per_head * kBlockQueries; };
        keys.list(p, b);
        keys.rows(p, b, kv, keys.count);
        auto cost = [&](int64_t n) {
          const int64_t next = first_of(n) + kBlockQueries;
          return first_of(n) >= end ? 0 : kRows + keys.seen_by(p, (next < end ? next : end) - 1);
        };
        float* sums = partial ? partial + item * size : own;
        for (int64_t i = 0; i < size; i += kWidth) store(sums + i, vfloat{});
        double* by = distances ? distances + item * group * reach : nullptr;
        for (int64_t i = 0; by && i < group * reach; ++i) by[i] = 0;
        for (int64_t i = 0; by && i < reach; ++i) scratch.distances[i] = 0;
        const int64_t last = share_begin(item % parts + 1, (int)parts, blocks, cost);
        for (int64_t n = share_begin(item % parts, (int)parts, blocks, cost); n < last; ++n)
          if (first_of(n) < end)
            block(keys, scratch, b, kv * group + n / per_head, first_of(n), sums, sums + size / 2,
                  by ? by + n / per_head * reach : nullptr);
        if (!partial) finish(keys, b, kv, sums, 1);
      }
      std::free(own), std::free(scratch.base);
      keys.release();
    });
    if (distances)
      for (int64_t h = 0; h < p.h; ++h)
        p.relative.add_buckets(h, grad_table, [&](int64_t i) {
          double sum = 0;
          for (int64_t b = 0; b < p.b; ++b)
            for (int64_t part = 0; part < parts; ++part)
              sum += distances[(((b * p.hkv + h / group) * parts + part) * group + h % group) * reach + i];
          return sum;
        });
    std::free(distances);
    if (!partial) return;
    parallel_chunks(threads < heads ? threads : (int)heads, heads, [&](int, int64_t begin, int64_t end) {
      Keys<T> keys;
      for (int64_t n = begin; n < end; ++n) {
        keys.list(p, n / p.hkv);
        finish(keys, n / p.hkv, n % p.hkv, partial + n * parts * size, parts);
      }
      keys.release();
    });
    std::free(partial);
  }
};

}  // namespace

void attention_backward(addr grad_out, addr query, addr key, addr value, addr out, addr lse, addr mask, addr bias,
                        addr table, addr buckets, addr seed, addr starts, addr grad_query, addr grad_key,
                        addr grad_value, addr grad_bias, addr grad_table, addr layout, int dtype) {
  const auto& n = *(const AttentionLayout*)layout;
  PYFUSED_BY_DTYPE(dtype, {
    Problem<T> p(query, key, value, mask, bias, seed, starts, n);
    if (p.no_queries()) {  // without queries the gradients of key and value are zero
      const int64_t bytes = (starts ? 1 : p.b) * p.sk * p.hkv * p.d * sizeof(T);
      if (bytes) std::memset((void*)grad_key, 0, bytes), std::memset((void*)grad_value, 0, bytes);
      return;
    }
    p.with_relative(table, buckets, n, -1, kGroup);
    Backward<T>{p, p.strided(out, n.out), p.strided(grad_out, n.grad_out), (const float*)lse, (T*)grad_query, (T*)grad_key,
                (T*)grad_value, (T*)grad_bias, (float*)grad_table}.run();
    p.release();
  })
}

}  // namespace pyfused::PYFUSED_ISA
