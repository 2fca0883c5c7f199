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

void attention_packed_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets,
                              addr seed, addr cu_seqlens, addr out, addr lse, addr layout, int multiprocessors,
                              int dtype, int device, addr stream) {
  attend_many<true>("attention of packed sequences",
                    {query, key, value, 0, 0, table, buckets, seed, cu_seqlens, out, lse, layout}, multiprocessors,
                    dtype, device, stream);
}

}  // namespace pyfused::cuda
