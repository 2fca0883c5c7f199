// What does one call of attention on the CPU compute with? Its tensors, sizes and options, in plain and in packed form.
#pragma once

#include <cmath>

#include "pyfused/attention_layout.h"
#include "pyfused/parallel.h"
#include "relative_bias.h"

namespace pyfused::PYFUSED_ISA {
namespace {

template <class T> struct Strided {  // (batch, head, sequence) strides; the last dimension is contiguous
  T* data;
  int64_t batch, head, row;
  T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * row; }
};

// In the packed form memory holds one batch entry, b counts sequences, and sq = sk counts the rows of all sequences.
// Queries and keys are numbered among all rows, so causality and distances need no special case.
template <class T> struct Problem {
  int64_t b, h, hkv, sq, sk, d;
  const int32_t* starts;  // (b + 1) in the packed form, else null
  int64_t longest;        // the most queries of one batch entry
  Strided<const T> query, key, value;
  const uint8_t* mask;  // (B, Sk), nonzero for a real key, or null
  const T* bias;
  int64_t bias_stride[4];
  bool causal, dropout;
  float scale, keep_scale;  // keep_scale = 1 / (1 - dropout_p)
  uint32_t threshold, seed[2];
  ByDistance relative;  // has no rows if there is no relative bias

  Problem(addr q, addr k, addr v, addr mask, addr bias, addr seed, addr starts, const AttentionLayout& n)
      : b(n.batch), h(n.heads), hkv(n.kv_heads), sq(n.query_length), sk(n.key_length), d(n.head_size),
        starts((const int32_t*)starts), longest(n.longest), query(strided(q, n.query)), key(strided(k, n.key)),
        value(strided(v, n.value)), mask((const uint8_t*)mask), bias((const T*)bias), causal(n.is_causal), dropout(seed != 0),
        scale((float)n.scale), keep_scale((float)(1.0 / (1.0 - n.dropout_p))) {
    for (int i = 0; i < 4; ++i) bias_stride[i] = n.bias[i];
    const double words = std::nearbyint(n.dropout_p * 4294967296.0);
    threshold = words < 4294967295.0 ? (uint32_t)words : 4294967295u;
    for (int i = 0; i < 2; ++i) this->seed[i] = seed ? (uint32_t)(*(const uint64_t*)seed >> (32 * i)) : 0;
  }

  Strided<const T> strided(addr data, const int64_t* stride) const {
    return {(const T*)data, starts ? 0 : stride[0], stride[1], stride[2]};
  }

  // Whether there is nothing to compute; then divisors may be 0. (Without keys the results are zeros.)
  bool no_queries() const { return !b || !h || !hkv || !longest || !d; }

  // The queries of a batch entry are [first_query, end_query). In the packed form so are its keys.
  int64_t first_query(int64_t b) const { return starts ? starts[b] : 0; }
  int64_t end_query(int64_t b) const { return starts ? starts[b + 1] : sq; }
  int64_t end_key(int64_t b) const { return starts ? starts[b + 1] : sk; }
  // The row of a query in (B, S) and in (B, H, S).
  int64_t token(int64_t b, int64_t i) const { return starts ? i : b * sq + i; }
  int64_t row(int64_t b, int64_t h, int64_t i) const { return starts ? h * sq + i : (b * this->h + h) * sq + i; }

  // Makes T5's bias by distance; release() frees it. Query i has position i + sk - sq. A row of the bias follows ascending
  // keys for sign 1, ascending queries for sign -1.
  void with_relative(addr table, addr buckets, const AttentionLayout& n, int64_t sign, int64_t lanes) {
    if (!table) return;
    relative = ByDistance(buckets, n.span, h, sign > 0 ? 1 - sk : 1 - sq, sign > 0 ? sq - 1 : sk - 1, sign, lanes);
    if (n.table_float32) relative.fill((const float*)table, n.table_bucket, n.table_head);
    else relative.fill((const T*)table, n.table_bucket, n.table_head);
  }
  void release() const { std::free(relative.rows); }
};

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
