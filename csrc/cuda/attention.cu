// attention on CUDA, many queries, float16 and bfloat16: softmax(scale * query key^T + bias, visible keys) value.
// (Few queries: attention_decode.cu; float32: attention_float32.cu; packed sequences: attention_packed.cu; choice of
// tiles: attention_launch.cuh; the kernel: attention_tile.cuh.)
//
// Moves query, key, value and out once (each tile of queries reads keys again from the L2). Does 4 B H Sq Sk D FLOPs, half
// of it under a causal mask, and B H Sq Sk exponentials. B4 H16 S2048 D64: 67 MB, 22 us at 3.0 TB/s; 69 GFLOP, 86 us at
// 798 TFLOP/s. FlashAttention-2, which uses mma.sync too, reaches 318 TFLOP/s on Hopper: predicted 240 us, 290 TFLOP/s, and
// 130 us under a causal mask. An H200 took 540 us for B4 H16 S2048 D128 (255 TFLOP/s), 935 us for B16 H12 S2048 D64 with T5's
// bias (220), 523 us for B8 H16 S2048 D64 (263), 339 causal. Triton took 309, 545, 343 and 226.
#include "attention_launch.cuh"

namespace pyfused::cuda {

void attention_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets, addr seed,
                       addr cu_seqlens, addr out, addr lse, addr layout, int multiprocessors, int dtype, int device,
                       addr stream) {
  attend_many<false>("attention forward", {query, key, value, mask, bias, table, buckets, seed, 0, out, lse, layout},
                     multiprocessors, dtype, device, stream);
}

}  // namespace pyfused::cuda
