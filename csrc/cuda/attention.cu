// attention on CUDA, many queries, float16 and bfloat16: softmax(scale * query key^T + bias, visible keys) value.
// (Few queries: attention_decode.cu; float32: attention_float32.cu; packed sequences: attention_packed.cu; which tiles:
// attention_launch.cuh; the kernel itself: attention_tile.cuh.)
//
// Moves query, key, value and out once (keys come again from the L2 for each tile of queries) and does 4 B H Sq Sk D
// FLOPs, half of it under a causal mask, and B H Sq Sk exponentials. B4 H16 S2048 D64: 67 MB, 22 us at 3.0 TB/s; 69
// GFLOP, 86 us at 798 TFLOP/s, and mma.sync reaches about 60% of that on Hopper: predicted 200 us, 340 TFLOP/s, 110
// us under a causal mask. Not yet measured.
#include "attention_launch.cuh"

namespace pyfused::cuda {

void attention_float32(const Launch& launch, const AttentionPointers& p, bool is_causal, double scale, double dropout_p,
                       bool packed, int64_t chunk, addr stream);

void attention_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets, addr seed,
                       addr out, addr lse, addr layout, bool is_causal, double scale, double dropout_p,
                       int multiprocessors, int dtype, int device, addr stream) {
  const AttentionPointers p{query, key, value, mask, bias, table, buckets, seed, out, lse, layout};
  const int64_t* n = (const int64_t*)layout;
  const Launch launch{"attention forward", n[0] * n[1] * n[3], n[5], device};
  if (has_no_work(n)) return;
  const OnDevice guard(launch);
  if (dtype == 0) {
    attention_float32(launch, p, is_causal, scale, dropout_p, false, n[4], stream);
  } else {
    const Attention a = arguments(p, is_causal, scale, dropout_p, false, n[4], 2);
    if (dtype == 1) by_case<__half, false>(launch, a, multiprocessors, stream);
    else by_case<__nv_bfloat16, false>(launch, a, multiprocessors, stream);
  }
  launch.check();
}

}  // namespace pyfused::cuda
