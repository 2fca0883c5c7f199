// What does one generation step read? A plan, the layers and their weights, which is made once, and a call, the tokens and caches.
//
// Python fills in the structs, and the CPU and CUDA kernels read them. kernels/shared/decode_plan.py has the same fields in the
// same order; tests/ops/test_decode_plan.py compares the two. Each number has 8 bytes. Addresses are 0 for what is absent;
// strides count elements. T is the dtype of weights, caches and logits.
#pragma once

#include <cstdint>

namespace pyfused {

enum DecodeKind : int64_t { kByRows = 0, kByColumns = 1, kInt4 = 4, kInt8 = 8 };

// y = x W^T + bias, W (n, k). n is 0 for a matrix that a layer lacks.
struct DecodeMatrix {
  std::uintptr_t weight;
  std::uintptr_t bias;   // T (n)
  std::uintptr_t scale;  // of integers, which pyfused/weight_format.py explains: float (n) for int8, bfloat16 (n, k / 32) for int4
  int64_t n, k;
  int64_t stride;  // between the rows of memory, of int4 in bytes
  int64_t kind;    // kByRows: T; kByColumns: T, but memory holds (k, n), as Hugging Face's Conv1D does; integers: how many bits
};

struct DecodeNorm {
  std::uintptr_t weight, bias;  // T; no bias in an RMS norm
  double eps;
};

struct DecodeLayer {
  DecodeNorm attention_norm;
  DecodeMatrix query, key, value, output;
  DecodeNorm cross_norm;  // without cross-attention cross_query.n is 0
  DecodeMatrix cross_query, cross_output;
  DecodeNorm feed_forward_norm;
  DecodeMatrix gate, inner, outer;  // gate.n is 0 for activation(inner(x)), else activation(gate(x)) * inner(x)
  double scale, cross_scale;        // of the scores
};

struct DecodePlan {
  int64_t layers, hidden, heads, kv_heads, head_size, intermediate;
  int64_t is_rms;      // 1: RMS norms, 0: layer norms
  int64_t activation;  // a code of activation_codes.h
  DecodeMatrix token_embedding, position_embedding;
  DecodeMatrix head;  // without it the result is the final norm, (B, hidden), in place of logits
  DecodeNorm final_norm;
  double logits_scale;
  std::uintptr_t table, buckets;  // T5's bias: T or float (num_buckets, heads); int32, see kernels/shared/buckets.py
  int64_t table_bucket, table_head, table_float32, span;  // as in attention_layout.h
  std::uintptr_t layer;                                   // DecodeLayer[layers]
};

// B rows get one token each. Row b writes its key and value at place p of the cache and sees the places 0 .. p.
struct DecodeCall {
  int64_t rows;
  std::uintptr_t tokens;        // int64 (B)
  std::uintptr_t places;        // int64 (B), or 0: `place` for all rows
  std::uintptr_t position_ids;  // int64 (B), rows of position_embedding, or 0: the places
  int64_t place, most;          // `most`: the largest place + 1
  std::uintptr_t mask;          // uint8 (B, >= most), nonzero for a visible key
  int64_t mask_stride;
  std::uintptr_t caches;             // addresses of a key and a value for each layer, each (B, kv_heads, capacity, head_size)
  int64_t batch_stride, head_stride, row_stride;
  std::uintptr_t cross_caches;       // as caches, (sources, heads, source_length, head_size). B / sources rows share a source
  int64_t sources, source_length, cross_batch_stride, cross_head_stride, cross_row_stride;
  std::uintptr_t cross_mask;         // uint8 (sources, source_length)
  std::uintptr_t logits;             // T (B, vocabulary)
  std::uintptr_t chosen;             // int64 (B), the likeliest token, -1 where the largest logit is not finite; or 0
  std::uintptr_t uniform;            // double (B) in [0, 1): choose a token drawn with it; or 0
  double temperature, top_p;         // of the draw, see kernels/shared/draw.py
  int64_t top_k;                     // 0 for all
};

// Whether there is nothing to compute. Then sizes that are divisors may be 0.
inline bool is_empty(const DecodePlan& p, const DecodeCall& c) {
  return c.rows <= 0 || p.hidden <= 0 || p.heads <= 0 || p.kv_heads <= 0 || p.head_size <= 0;
}

}  // namespace pyfused
