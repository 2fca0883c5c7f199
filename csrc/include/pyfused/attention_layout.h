// What is a call of attention, its tensors' addresses aside? Sizes, strides and options, in one struct that Python fills in and
// the kernels of both backends read.
//
// kernels/shared/attention_layout.py has the same fields in the same order; tests/ops/test_attention_arguments.py compares
// the two. Each number has 8 bytes. Strides count elements.
#pragma once

#include <cstdint>

namespace pyfused {

struct AttentionLayout {
  int64_t batch;  // B; of packed sequences how many there are
  int64_t heads, kv_heads;
  int64_t query_length, key_length;  // Sq, Sk; of packed sequences T, the rows of all of them
  int64_t head_size;
  int64_t longest;                                          // queries of a batch entry or sequence at most
  int64_t query[3], key[3], value[3], out[3], grad_out[3];  // strides: batch, head, row
  int64_t bias[4];                                          // strides of attn_bias
  int64_t chunk;                     // stride of out's parts, where the keys are split over blocks; else 0
  int64_t table_bucket, table_head;  // strides of T5's table
  int64_t table_float32;             // 1: the table is float32; 0: it has query's dtype
  int64_t span;                      // the buckets are those of the distances -span .. span
  int64_t is_causal;
  double scale, dropout_p;
};

}  // namespace pyfused
