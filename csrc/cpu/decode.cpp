// decode on the CPU: one token per row through a whole decoder, in one parallel region. Weights set the pace; each is read once.
//
// A phase is a product whose outputs, or an attention whose heads, are divided among the threads; a barrier ends it. The residual
// stream and the norms are so little work that each thread computes them for itself, which saves barriers. Activations are
// float32 throughout; caches and logits have the weights' dtype. GPT-2 124M has 62 phases; a barrier costs about 1 us.
#include "kernels.h"

#include "attention_few.h"
#include "decode_product.h"
#include "row_norm.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// ---- a step ---------------------------------------------------------------------------------------------------------

template <class T> struct Decode {
  const DecodePlan& plan;
  const DecodeCall& call;
  const int64_t m = call.rows, hidden = plan.hidden, inner = plan.heads * plan.head_size;
  const bool has_cross = plan.layers && layer(0).cross_query.n;
  const int steps = has_cross ? 8 : 5, threads = threads_of();
  ByDistance relative{};
  float* memory = nullptr;

  const DecodeLayer& layer(int64_t i) const { return ((const DecodeLayer*)plan.layer)[i]; }
  int64_t place(int64_t b) const { return call.places ? ((const int64_t*)call.places)[b] : call.place; }
  const T* cache(addr addresses, int64_t i, int which) const { return (const T*)((const addr*)addresses)[2 * i + which]; }

  // A phase's average work decides: small models stay on one thread.
  int threads_of() const {
    const int64_t work = 2 * m * hidden * (2 * inner + 3 * plan.intermediate) / steps;
    return threads_for(64, work / 64);
  }

  // ---- memory: what all threads read, then each thread's own --------------------------------------------------------

  static constexpr int64_t kSums = 2 * ColumnsProduct<T>::kChunk;
  int64_t padded_head() const { return (plan.head_size + kWidth - 1) / kWidth * kWidth; }
  int64_t state_size() const { return 2 + padded_head(); }
  int64_t widest() const {
    const int64_t k = hidden > inner ? hidden : inner;
    return (k > plan.intermediate ? k : plan.intermediate) + kMostPadding;
  }
  int64_t beams() const { return call.sources ? m / call.sources : 1; }  // rows that share an encoder's keys
  int64_t most_queries() const {  // of one key head
    const int64_t group = plan.heads / plan.kv_heads;
    return group > beams() ? group : beams();
  }
  int64_t most_keys() const { return call.most > call.source_length ? call.most : call.source_length; }

  float* query() const { return memory; }                      // (m, inner), as `seen`, what attention returns
  float* seen() const { return query() + m * inner; }
  float* branch() const { return seen() + m * inner; }         // (m, hidden), not yet added to the stream
  float* active() const { return branch() + m * hidden; }      // (m, intermediate)
  float* tops() const { return active() + m * plan.intermediate; }  // (threads, m), the largest logit of a share
  int32_t* winners() const { return (int32_t*)tops() + threads * m; }  // (threads, m), the token that has it
  int64_t shared_size() const { return m * (2 * inner + hidden + plan.intermediate + 2 * threads); }

  struct Own {
    float *x, *y, *packed, *sums, *query, *state;  // x is the residual stream, y its norm
    int32_t* position;                             // the keys that a row sees
  };
  int64_t own_size() const {
    return m * (2 * hidden + widest() + 2 * kSums) + most_queries() * (padded_head() + state_size()) + most_keys() + kWidth;
  }
  Own own(int share) const {
    Own o;
    o.x = memory + shared_size() + share * own_size(), o.y = o.x + m * hidden, o.packed = o.y + m * hidden;
    o.sums = o.packed + m * widest(), o.query = o.sums + 2 * m * kSums;
    o.state = o.query + most_queries() * padded_head();
    o.position = (int32_t*)(o.state + most_queries() * state_size());
    return o;
  }

  void run() {
    if (is_empty(plan, call)) return;
    if (plan.table) {
      relative = ByDistance(plan.buckets, plan.span, plan.heads, -plan.span, 0, 1, kWidth);
      if (plan.table_float32) relative.fill((const float*)plan.table, plan.table_bucket, plan.table_head);
      else relative.fill((const T*)plan.table, plan.table_bucket, plan.table_head);
    }
    memory = floats(shared_size() + threads * own_size());
    parallel_phases(threads, (int)plan.layers * steps + 2, [&](int phase, int share) { run_phase(phase, share, own(share)); });
    std::free(memory);
    std::free(relative.rows);
  }

  void run_phase(int phase, int share, const Own& o) const {
    if (phase == 0) embed(o);
    const int64_t i = phase / steps;
    const int step = phase % steps;
    if (i == plan.layers) return step == 0 ? logits(share, o) : choose(share);
    const DecodeLayer& l = layer(i);
    switch (has_cross || step < 3 ? step : step + 3) {
      case 0:
        norm(l.attention_norm, phase > 0, o);
        product(l.query, o.y, share, o, rows_of(query(), inner));
        product(l.key, o.y, share, o, places_of(i, 0));
        product(l.value, o.y, share, o, places_of(i, 1));
        break;
      case 1: attend(i, share, o); break;
      case 2: product(l.output, seen(), share, o, rows_of(branch(), hidden)); break;
      case 3:
        norm(l.cross_norm, true, o);
        product(l.cross_query, o.y, share, o, rows_of(query(), inner));
        break;
      case 4: attend_cross(i, share, o); break;
      case 5: product(l.cross_output, seen(), share, o, rows_of(branch(), hidden)); break;
      case 6:
        norm(l.feed_forward_norm, true, o);
        feed_forward(l, share, o);
        break;
      case 7: product(l.outer, active(), share, o, rows_of(branch(), hidden)); break;
    }
  }

  // ---- rows ---------------------------------------------------------------------------------------------------------

  void embed(const Own& o) const {
    const DecodeMatrix &t = plan.token_embedding, &p = plan.position_embedding;
    for (int64_t b = 0; b < m; ++b) {
      const int64_t token = ((const int64_t*)call.tokens)[b];
      float* x = o.x + b * hidden;
      if (t.kind == kInt4) {
        widen_groups((const int4x2*)t.weight + token * t.stride, (const bf16*)t.scale + token * (hidden / kScaleGroup), hidden, x);
      } else if (t.kind == kInt8) {
        const int8_t* row = (const int8_t*)t.weight + token * t.stride;
        const float scale = ((const float*)t.scale)[token];
        each(x, hidden, [&](int64_t c, auto get) { return get(row + c) * scale; });
      } else {
        const T* row = (const T*)t.weight + token * t.stride;
        each(x, hidden, [&](int64_t c, auto get) { return get(row + c); });
      }
      if (!p.n) continue;
      const int64_t at = call.position_ids ? ((const int64_t*)call.position_ids)[b] : place(b);
      const T* row = (const T*)p.weight + at * p.stride;
      each(x, hidden, [&](int64_t c, auto get) { return get(x + c) + get(row + c); });
    }
  }

  // y = norm(x), or x += branch and then y = norm(x).
  void norm(const DecodeNorm& n, bool adds, const Own& o) const { plan.is_rms ? norm_as<false>(n, adds, o) : norm_as<true>(n, adds, o); }
  template <bool CENTRED> void norm_as(const DecodeNorm& n, bool adds, const Own& o) const {
    const Forward<T, CENTRED, float> f{o.x, adds ? branch() : nullptr, (const T*)n.weight, (const T*)n.bias, o.y, o.x,
                                       nullptr, nullptr, hidden, hidden, hidden, (float)n.eps};
    for (int64_t b = 0; b < m; ++b) f.row(b);
  }

  // ---- products -----------------------------------------------------------------------------------------------------

  // Calls body(j, count) for the pieces of this share.
  template <class P, class Body> void pieces(int64_t n, int share, const Body& body) const {
    const int64_t units = (n + P::kUnit - 1) / P::kUnit;
    const int64_t end = units * (share + 1) / threads * P::kUnit, last = end < n ? end : n;
    for (int64_t j = units * share / threads * P::kUnit; j < last; j += P::kChunk)
      body(j, last - j < P::kChunk ? last - j : P::kChunk);
  }

  static void add_bias(addr bias, int64_t j, int64_t count, float* sums) {
    if (!bias) return;
    const T* from = (const T*)bias + j;
    each(sums, count, [&](int64_t c, auto get) { return get(sums + c) + get(from + c); });
  }

  // Calls put(row, j, count, sums) with pieces of x W^T + bias. x is (m, k).
  template <class Put> void product(const DecodeMatrix& w, const float* x, int share, const Own& o, const Put& put) const {
    by_kind<T>(w, [&](auto kind) {
      using P = typename decltype(kind)::type;
      const P p(w, x, m, o.packed);
      p.pack_rows();
      pieces<P>(w.n, share, [&](int64_t j, int64_t count) {
        p.block(j, count, o.sums);
        for (int64_t b = 0; b < m; ++b) {
          float* sums = o.sums + b * P::kChunk;
          add_bias(w.bias, j, count, sums);
          put(b, j, count, sums);
        }
      });
    });
  }

  static auto rows_of(float* to, int64_t n) {
    return [=](int64_t b, int64_t j, int64_t count, const float* sums) { std::memcpy(to + b * n + j, sums, count * sizeof(float)); };
  }

  // Into the cache: output j of a row belongs to head j / d.
  auto places_of(int64_t i, int which) const {
    T* base = (T*)cache(call.caches, i, which);
    return [this, base](int64_t b, int64_t j, int64_t count, const float* sums) {
      const int64_t d = plan.head_size;
      T* row = base + b * call.batch_stride + place(b) * call.row_stride;
      for (int64_t c = 0; c < count;) {
        const int64_t head = (j + c) / d, at = (j + c) % d, n = d - at < count - c ? d - at : count - c;
        each(row + head * call.head_stride + at, n, [&](int64_t k, auto get) { return get(sums + c + k); });
        c += n;
      }
    };
  }

  // active = activation(inner(y)), or activation(gate(y)) * inner(y).
  void feed_forward(const DecodeLayer& l, int share, const Own& o) const {
    const int64_t f = plan.intermediate;
    if (!l.gate.n)
      return product(l.inner, o.y, share, o, [&](int64_t b, int64_t j, int64_t count, const float* sums) {
        activate(sums, nullptr, count, active() + b * f + j);
      });
    by_kind<T>(l.gate, [&](auto kind) {  // inner is stored in the same way
      using P = typename decltype(kind)::type;
      const P gate(l.gate, o.y, m, o.packed), up(l.inner, o.y, m, o.packed);
      gate.pack_rows();
      float* others = o.sums + m * kSums;
      pieces<P>(f, share, [&](int64_t j, int64_t count) {
        gate.block(j, count, o.sums);
        up.block(j, count, others);
        for (int64_t b = 0; b < m; ++b) {
          float *g = o.sums + b * P::kChunk, *u = others + b * P::kChunk;
          add_bias(l.gate.bias, j, count, g);
          add_bias(l.inner.bias, j, count, u);
          activate(g, u, count, active() + b * f + j);
        }
      });
    });
  }

  void activate(const float* x, const float* factor, int64_t count, float* to) const {
    PYFUSED_BY_ACTIVATION((int)plan.activation, each(to, count, [&](int64_t c, auto get) {
      const vfloat v = A::value(get(x + c));
      return factor ? v * get(factor + c) : v;
    });)
  }

  // ---- attention ----------------------------------------------------------------------------------------------------

  Few<T, float> attention(addr caches, int64_t i, int64_t kv_heads, int64_t queries, const int64_t* stride) const {
    AttentionLayout n{};
    n.batch = m, n.heads = plan.heads, n.kv_heads = kv_heads, n.query_length = queries, n.head_size = plan.head_size;
    for (int s = 0; s < 3; ++s) n.key[s] = n.value[s] = stride[s];
    return {Problem<T>(0, (addr)cache(caches, i, 0), (addr)cache(caches, i, 1), 0, 0, 0, 0, n), seen(), nullptr};
  }

  // The places below `end` that a mask leaves.
  static int64_t list(const uint8_t* mask, int64_t end, int32_t* position) {
    int64_t count = 0;
    for (int64_t j = 0; j < end; ++j) {
      position[count] = (int32_t)j;
      count += !mask || mask[j];
    }
    return count;
  }

  // Attends from `queries` rows of o.query to the listed keys of one key head.
  void attend_head(const Few<T, float>& few, int64_t b, int64_t kv, int64_t queries, const Own& o, int64_t count) const {
    for (int64_t r = 0; r < queries * state_size(); ++r) o.state[r] = r % state_size() ? 0 : -INFINITY;
    Keys<T> keys;
    keys.position = o.position, keys.count = count;
    few.keys_of(b, kv, keys, 0, count, o.query, o.state);
    few.finish(b, kv, o.state, 1);
  }

  void attend(int64_t i, int share, const Own& o) const {
    const int64_t stride[3] = {call.batch_stride, call.head_stride, call.row_stride};
    const int64_t group = plan.heads / plan.kv_heads, items = m * plan.kv_heads;
    Few<T, float> few = attention(call.caches, i, plan.kv_heads, 1, stride);
    few.p.relative = relative;
    int64_t listed = -1, count = 0;
    for (int64_t item = items * share / threads; item < items * (share + 1) / threads; ++item) {
      const int64_t b = item / plan.kv_heads, kv = item % plan.kv_heads;
      if (b != listed) {
        few.p.sk = place(b) + 1, listed = b;
        count = list(call.mask ? (const uint8_t*)call.mask + b * call.mask_stride : nullptr, few.p.sk, o.position);
      }
      for (int64_t r = 0; r < group; ++r)
        few.take(query() + b * inner + (kv * group + r) * plan.head_size, plan.head_size, (float)layer(i).scale,
                 o.query + r * padded_head());
      attend_head(few, b, kv, group, o, count);
    }
  }

  void attend_cross(int64_t i, int share, const Own& o) const {
    const int64_t stride[3] = {call.cross_batch_stride, call.cross_head_stride, call.cross_row_stride};
    const int64_t times = beams(), items = call.sources * plan.heads;
    Few<T, float> few = attention(call.cross_caches, i, plan.heads, times, stride);
    few.p.sk = call.source_length;
    int64_t listed = -1, count = 0;
    for (int64_t item = items * share / threads; item < items * (share + 1) / threads; ++item) {
      const int64_t source = item / plan.heads, head = item % plan.heads;
      if (source != listed) {
        const uint8_t* mask = (const uint8_t*)call.cross_mask;
        listed = source, count = list(mask ? mask + source * call.source_length : nullptr, call.source_length, o.position);
      }
      for (int64_t r = 0; r < times; ++r)
        few.take(query() + (source * times + r) * inner + head * plan.head_size, plan.head_size, (float)layer(i).cross_scale,
                 o.query + r * padded_head());
      attend_head(few, source, head, times, o, count);
    }
  }

  // ---- logits and the likeliest token -------------------------------------------------------------------------------

  void logits(int share, const Own& o) const {
    norm(plan.final_norm, plan.layers > 0, o);
    T* to = (T*)call.logits;
    const int64_t n = plan.head.n;
    if (!n) {  // each share has all rows
      if (share == 0) each(to, m * hidden, [&](int64_t c, auto get) { return get(o.y + c); });
      return;
    }
    const float scale = (float)plan.logits_scale;
    for (int64_t b = 0; b < m; ++b) tops()[share * m + b] = -INFINITY, winners()[share * m + b] = 0;
    product(plan.head, o.y, share, o, [&](int64_t b, int64_t j, int64_t count, float* sums) {
      each(to + b * n + j, count, [&](int64_t c, auto get) { return get(sums + c) * scale; });
      if (call.chosen) keep_top(to + b * n + j, j, count, tops() + share * m + b, winners() + share * m + b);
    });
  }

  // The first of the largest logits, as they are rounded. NaN counts as the largest.
  static void keep_top(const T* logit, int64_t j, int64_t count, float* top, int32_t* winner) {
    vfloat most = splat(-INFINITY);
    vint nan{};
    int64_t c = 0;
    for (; c + kWidth <= count; c += kWidth) {
      const vfloat v = load(logit + c);
      nan |= v != v;
      most = max(most, v);
    }
    float found = max_lanes(most);
    bool bad = false;
    for (int q = 0; q < kWidth; ++q) bad |= nan[q] != 0;
    for (; c < count; ++c) {
      const float v = load_one(logit + c);
      bad |= v != v, found = v > found ? v : found;
    }
    if (bad) *top = NAN;
    if (!(found > *top)) return;  // also if *top is NaN
    *top = found;
    for (c = 0; load_one(logit + c) != found; ++c) {}
    *winner = (int32_t)(j + c);
  }

  void choose(int share) const {
    if (share || !call.chosen) return;
    for (int64_t b = 0; b < m; ++b) {
      float top = tops()[b];
      int64_t winner = winners()[b];
      for (int t = 1; t < threads; ++t) {
        const float other = tops()[t * m + b];
        if (other != other || other > top) top = other, winner = winners()[t * m + b];
        if (top != top) break;
      }
      ((int64_t*)call.chosen)[b] = std::isfinite(top) ? winner : -1;
    }
  }
};

}  // namespace

void decode_forward(addr plan, addr call, int dtype) {
  PYFUSED_BY_DTYPE(dtype, Decode<T>{*(const DecodePlan*)plan, *(const DecodeCall*)call}.run();)
}

// Before the copies are read a step reads weights that no cache holds as well. So the copies go past the caches: a third less
// traffic of memory.
void decode_copies(addr from, addr to, int64_t count, int64_t heads, int64_t bytes, int64_t step) {
  constexpr int64_t vector = kWidth * sizeof(float), large = 1 << 20;
  const int64_t parts = count * heads;
  auto start = [&](addr list, int64_t part, int64_t step) { return (char*)((addr*)list)[part / heads] + part % heads * step; };
  parallel_chunks(threads_for(parts, bytes), parts, [&](int, int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const char* old = start(from, part, bytes);
      char* copy = start(to, part, step);
      if (parts * bytes < large || ((addr)copy | (addr)bytes) % vector) {
        std::memcpy(copy, old, bytes);
        continue;
      }
      for (int64_t i = 0; i < bytes; i += vector) stream((float*)(copy + i), load((const float*)(old + i)));
    }
    streams_end();
  });
}

}  // namespace pyfused::PYFUSED_ISA
