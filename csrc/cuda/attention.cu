// attention on CUDA, many queries, float16 and bfloat16: softmax(scale * query key^T + bias, visible keys) value.
//
// Moves query, key, value and out once (keys come again from the L2 for each tile of queries) and does 4 B H Sq Sk D
// FLOPs, half of it under a causal mask, and B H Sq Sk exponentials. B4 H16 S2048 D64: 67 MB, 22 us at 3.0 TB/s;
// 69 GFLOP, 86 us at 798 TFLOP/s, and mma.sync reaches about 60% of that on Hopper: predicted 200 us, 340 TFLOP/s, 110 us
// under a causal mask. Not yet measured.
//
// Tiling: D = 64 has 128 rows on four warps, 32 rows each, so that a fragment of K or V read from shared memory serves
// two products: 16 rows a warp would ask of the shared memory what it can just give. Longer heads have 16 rows a warp,
// since the running output alone takes D / 2 registers there, and so has any launch that would leave multiprocessors
// idle. Registers leave two blocks on a multiprocessor, whose exponentials and products then overlap. Tiles of keys that
// causality or padding hides altogether cost nothing.
#include "attention_tile.cuh"

namespace pyfused::cuda {
namespace {

template <class T, int D, int MR, int WM, int BN, bool EXTRAS>
void launch_tiles(const Launch& launch, const Attention& a, addr stream) {
  constexpr int kStages = 2, kRows = MR * WM * 16;
  constexpr size_t bytes = tile_bytes<MR, WM, BN, kStages, D>();
  auto kernel = attention_kernel<T, D, MR, WM, 1, BN, kStages, EXTRAS>;
  allow_shared(launch, kernel, bytes);
  PYFUSED_LAUNCH(kernel, (unsigned)(up(a.sq, kRows) * a.b * a.h), WM * kWarp, bytes, stream, a);
}

template <class T, bool EXTRAS>
void by_head_size(const Launch& launch, const Attention& a, int multiprocessors, addr stream) {
  if constexpr (!EXTRAS)  // a bias or dropout takes registers that a second set of rows would need
    if (a.d <= 64 && up(a.sq, 128) * a.b * a.h >= multiprocessors)
      return launch_tiles<T, 64, 2, 4, 64, false>(launch, a, stream);
  if (a.d <= 64) launch_tiles<T, 64, 1, 4, 64, EXTRAS>(launch, a, stream);
  else if (a.d <= 96) launch_tiles<T, 96, 1, 4, 64, EXTRAS>(launch, a, stream);
  else if (a.d <= 128) launch_tiles<T, 128, 1, 4, 64, EXTRAS>(launch, a, stream);
  else launch_tiles<T, 256, 1, 4, 32, EXTRAS>(launch, a, stream);
}

}  // namespace

void attention_float32(const Launch& launch, const AttentionPointers& p, bool is_causal, double scale, double dropout_p,
                       bool packed, int64_t chunk, addr stream);

void attention_forward(addr query, addr key, addr value, addr mask, addr bias, addr seed, addr out, addr lse,
                       addr layout, bool is_causal, double scale, double dropout_p,
                       int multiprocessors, int dtype, int device, addr stream) {
  const AttentionPointers p{query, key, value, mask, bias, seed, out, lse, layout};
  const int64_t* n = (const int64_t*)layout;
  const Launch launch{"attention forward", n[0] * n[1] * n[3], n[5], device};
  if (launch.rows == 0) return;
  const OnDevice guard(launch);
  if (dtype == 0) {
    attention_float32(launch, p, is_causal, scale, dropout_p, false, n[4], stream);
  } else {
    const Attention a = arguments(p, is_causal, scale, dropout_p, false, n[4], 2);
    const bool extras = a.bias || a.seed || !(a.scale > 0);
    if (dtype == 1 && extras) by_head_size<__half, true>(launch, a, multiprocessors, stream);
    else if (dtype == 1) by_head_size<__half, false>(launch, a, multiprocessors, stream);
    else if (extras) by_head_size<__nv_bfloat16, true>(launch, a, multiprocessors, stream);
    else by_head_size<__nv_bfloat16, false>(launch, a, multiprocessors, stream);
  }
  launch.check();
}

}  // namespace pyfused::cuda
