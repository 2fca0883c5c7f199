// What describes a call of attention besides its tensors' addresses? One struct of sizes, strides and options. Python fills it
// in; the CPU and CUDA kernels read it.
//
// kernels/shared/attention_layout.py has the same fields in the same order; tests/ops/test_attention_arguments.py compares
// the two. Each number has 8 bytes. Strides count elements.
#pragma once

#include <cstdint>

namespace pyfused {

struct AttentionLayout {
  int64_t batch;  // B, or the number of packed sequences
  int64_t heads, kv_heads;
  int64_t query_length, key_length;  // Sq, Sk; both are T, the rows of all sequences, if they are packed
  int64_t head_size;
  int64_t longest;                                          // the most queries of one batch entry or sequence
  int64_t query[3], key[3], value[3], out[3], grad_out[3];  // strides: batch, head, row
  int64_t bias[4];                                          // strides of attn_bias
  int64_t chunk;                     // stride of out's parts if the keys are split over blocks; else 0
  int64_t table_bucket, table_head;  // strides of T5's table
  int64_t table_float32;             // 1: the table is float32; 0: it has query's dtype
  int64_t span;                      // there is a bucket for each distance -span .. span
  int64_t is_causal;
  double scale, dropout_p;
};

}  // namespace pyfused
