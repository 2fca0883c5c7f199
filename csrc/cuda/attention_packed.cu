// attention on CUDA for packed sequences. Each sequence's result is that of attention.cu for this sequence alone.
//
// Moves query, key, value and out once and does 4 H D FLOPs for each pair of rows of one sequence. This is a padded batch's
// cost without the padding. 32 sequences of 128 to 512 rows, H 12, D 64, 16 bits: 63 MB or 21 us at 3.0 TB/s, 11 GFLOP or
// 23 us at 480 TFLOP/s; predicted 35 us. An H200 took 70 us, Triton 49.
//
// Tiling: as in attention_launch.cuh, with rows and keys counted within a sequence. A block finds its sequence in
// cu_seqlens (place_in_sequences), so nothing is computed or copied to the host before the launch.
#include "attention_launch.cuh"

namespace pyfused::cuda {

void attention_packed_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets,
                              addr seed, addr cu_seqlens, addr out, addr lse, addr layout, int multiprocessors,
                              int dtype, int device, addr stream) {
  attend_many<true>("attention of packed sequences",
                    {query, key, value, 0, 0, table, buckets, seed, cu_seqlens, out, lse, layout}, multiprocessors,
                    dtype, device, stream);
}

}  // namespace pyfused::cuda
