// attention on CUDA, many queries, float16 and bfloat16: softmax(scale * query key^T + bias, visible keys) value.
// (Few queries: attention_decode.cu; float32: attention_float32.cu; the kernel itself: attention_tile.cuh.)
//
// Moves query, key, value and out once (keys come again from the L2 for each tile of queries) and does 4 B H Sq Sk D
// FLOPs, half of it under a causal mask, and B H Sq Sk exponentials. B4 H16 S2048 D64: 67 MB, 22 us at 3.0 TB/s; 69
// GFLOP, 86 us at 798 TFLOP/s, and mma.sync reaches about 60% of that on Hopper: predicted 200 us, 340 TFLOP/s, 110
// us under a causal mask. Not yet measured.
//
// Tiling: D = 64 has 128 rows on four warps, 32 rows each, so that a fragment of K or V read from shared memory
// serves two products: 16 rows a warp would ask of the shared memory what it can just give. Longer heads have 16
// rows a warp, since the running output alone takes D / 2 registers there, and so has any launch that would leave
// multiprocessors idle. T5's bias alone has kernels of its own, which look it up by distance in shared memory and
// add one number for a tile of keys far away; a dense bias or dropout takes registers that a second set of rows
// would need, and whatever is combined with them runs there too. Registers leave two blocks on a multiprocessor,
// whose exponentials and products then overlap. Tiles of keys that nobody sees (causality, padding) cost nothing.
#include "attention_tile.cuh"

namespace pyfused::cuda {
namespace {

template <class T, int D, int MR, int BN, Extras EXTRAS>
void launch_tiles(const Launch& launch, const Attention& a, addr stream) {
  constexpr int kWarps = 4, kStages = 2, kRows = MR * kWarps * 16;
  const size_t bytes = tile_bytes<MR, kWarps, BN, kStages, D>() + distances(a) * sizeof(float);
  auto kernel = attention_kernel<T, D, MR, kWarps, 1, BN, kStages, EXTRAS>;
  allow_shared(launch, kernel, bytes);
  PYFUSED_LAUNCH(kernel, (unsigned)(up(a.sq, kRows) * a.b * a.h), kWarps * kWarp, bytes, stream, a);
}

template <class T> void by_case(const Launch& launch, const Attention& a, int multiprocessors, addr stream) {
  constexpr Extras kNone = Extras::kNone, kRelative = Extras::kRelative, kAny = Extras::kAny;
  const bool any = a.bias || a.seed || (a.table ? a.d > 128 : !(a.scale > 0));
  const bool many = up(a.sq, 128) * a.b * a.h >= multiprocessors;
  if (any) {
    if (a.d <= 64) launch_tiles<T, 64, 1, 64, kAny>(launch, a, stream);
    else if (a.d <= 128) launch_tiles<T, 128, 1, 64, kAny>(launch, a, stream);
    else launch_tiles<T, 256, 1, 32, kAny>(launch, a, stream);
  } else if (a.table) {
    if (a.d <= 64 && many) launch_tiles<T, 64, 2, 64, kRelative>(launch, a, stream);
    else if (a.d <= 64) launch_tiles<T, 64, 1, 64, kRelative>(launch, a, stream);
    else launch_tiles<T, 128, 1, 64, kRelative>(launch, a, stream);
  } else {
    if (a.d <= 64 && many) launch_tiles<T, 64, 2, 64, kNone>(launch, a, stream);
    else if (a.d <= 64) launch_tiles<T, 64, 1, 64, kNone>(launch, a, stream);
    else if (a.d <= 96) launch_tiles<T, 96, 1, 64, kNone>(launch, a, stream);
    else if (a.d <= 128) launch_tiles<T, 128, 1, 64, kNone>(launch, a, stream);
    else launch_tiles<T, 256, 1, 32, kNone>(launch, a, stream);
  }
}

}  // namespace

void attention_float32(const Launch& launch, const AttentionPointers& p, bool is_causal, double scale, double dropout_p,
                       bool packed, int64_t chunk, addr stream);

void attention_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets, addr seed,
                       addr out, addr lse, addr layout, bool is_causal, double scale, double dropout_p,
                       int multiprocessors, int dtype, int device, addr stream) {
  const AttentionPointers p{query, key, value, mask, bias, table, buckets, seed, out, lse, layout};
  const int64_t* n = (const int64_t*)layout;
  const Launch launch{"attention forward", n[0] * n[1] * n[3], n[5], device};
  if (launch.rows == 0) return;
  const OnDevice guard(launch);
  if (dtype == 0) {
    attention_float32(launch, p, is_causal, scale, dropout_p, false, n[4], stream);
  } else {
    const Attention a = arguments(p, is_causal, scale, dropout_p, false, n[4], 2);
    if (dtype == 1) by_case<__half>(launch, a, multiprocessors, stream);
    else by_case<__nv_bfloat16>(launch, a, multiprocessors, stream);
  }
  launch.check();
}

}  // namespace pyfused::cuda
