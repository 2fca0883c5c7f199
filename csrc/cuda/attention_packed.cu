// attention on CUDA of packed sequences, one behind the other: each computes what attention.cu would of it alone.
//
// Moves query, key, value and out once and does 4 H D FLOPs for each pair of rows of one sequence: what a padded batch
// costs without its padding. Sequences of 128 to 512 rows, 32 of them, H 12, D 64, 16 bits: 63 MB or 21 us at 3.0 TB/s,
// 11 GFLOP or 23 us at 480 TFLOP/s; predicted 35 us. Not yet measured.
//
// Tiling: attention_launch.cuh's, in sequence-local rows and keys; a block finds its sequence in cu_seqlens by itself
// (place_in_sequences), so that nothing has to be computed or copied to the host before the launch.
#include "attention_launch.cuh"

namespace pyfused::cuda {

void attention_float32(const Launch& launch, const AttentionPointers& p, bool is_causal, double scale, double dropout_p,
                       bool packed, int64_t chunk, addr stream);

void attention_packed_forward(addr query, addr key, addr value, addr cu_seqlens, addr table, addr buckets, addr seed,
                              addr out, addr lse, addr layout, bool is_causal, double scale, double dropout_p,
                              int multiprocessors, int dtype, int device, addr stream) {
  const AttentionPointers p{query, key, value, 0, 0, table, buckets, seed, out, lse, layout, cu_seqlens};
  const int64_t* n = (const int64_t*)layout;
  const Launch launch{"attention of packed sequences", n[1] * n[3], n[5], device};
  if (has_no_work(n)) return;
  const OnDevice guard(launch);
  if (dtype == 0) {
    attention_float32(launch, p, is_causal, scale, dropout_p, false, n[4], stream);
  } else {
    const Attention a = arguments(p, is_causal, scale, dropout_p, false, n[4], 2);
    if (dtype == 1) by_case<__half, true>(launch, a, multiprocessors, stream);
    else by_case<__nv_bfloat16, true>(launch, a, multiprocessors, stream);
  }
  launch.check();
}

}  // namespace pyfused::cuda
