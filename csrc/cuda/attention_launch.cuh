// Which tiles does attention of many queries use on the tensor cores? This file launches attention_tile.cuh's kernel.
//
// Tiling: D = 64 has 128 rows on four warps, 32 rows each, so a fragment of K or V from shared memory serves two
// products. 16 rows a warp would need all the bandwidth of shared memory. Longer heads still have 16 rows a warp,
// because the running output alone takes D / 2 registers there. So does any launch that would leave multiprocessors
// idle. T5's bias alone has its own kernels: they look it up by distance in shared memory and add one number for a
// far tile of keys. A dense bias or dropout takes the registers of a second set of rows, so those calls, with or
// without T5's bias, have 16 rows a warp too. Registers leave room for two blocks on a multiprocessor; one's
// exponentials overlap the other's products. Rows that are not aligned to 16 bytes are rare: one kernel for each head size
// serves them, and the others' loops load no single elements. Tiles of keys that no row sees (causality, padding) cost
// nothing. float32 has its own kernels in attention_float32.cu.
#pragma once

#include "attention_tile.cuh"

namespace pyfused::cuda {
namespace {

template <class T, int D, int MR, int BN, Extras EXTRAS, bool SEQUENCES, bool ALIGNED = true>
void launch_tiles(const Launch& launch, const Attention& a, addr stream) {
  constexpr int kWarps = 4, kStages = 2, kRows = MR * kWarps * 16;
  const size_t bytes = tile_bytes<MR, kWarps, BN, kStages, D>() + distances(a) * sizeof(float);
  auto kernel = attention_kernel<T, D, MR, kWarps, 1, BN, kStages, EXTRAS, SEQUENCES, ALIGNED>;
  allow_shared(launch, kernel, bytes);
  PYFUSED_LAUNCH(kernel, launch.blocks(tiles_of(a, kRows) * a.h), kWarps * kWarp, bytes, stream, a);
}

template <class T, bool SEQUENCES, bool ALIGNED> void any_case(const Launch& launch, const Attention& a, addr stream) {
  constexpr Extras kAny = Extras::kAny;
  if (a.d <= 64) launch_tiles<T, 64, 1, 64, kAny, SEQUENCES, ALIGNED>(launch, a, stream);
  else if (a.d <= 128) launch_tiles<T, 128, 1, 64, kAny, SEQUENCES, ALIGNED>(launch, a, stream);
  else launch_tiles<T, 256, 1, 32, kAny, SEQUENCES, ALIGNED>(launch, a, stream);
}

template <class T, bool SEQUENCES>
void by_case(const Launch& launch, const Attention& a, int multiprocessors, addr stream) {
  constexpr Extras kNone = Extras::kNone, kRelative = Extras::kRelative;
  const bool any = a.bias || a.seed || (a.table ? a.d > 128 : !(a.scale > 0));
  // Sequences of at most 64 rows would leave half the warps of a block of 128 rows without work.
  const bool many = tiles_of(a, 128) * a.h >= multiprocessors && !(SEQUENCES && mean_rows(a) <= 64);
  if (!a.aligned) {
    any_case<T, SEQUENCES, false>(launch, a, stream);
  } else if (any) {
    any_case<T, SEQUENCES, true>(launch, a, stream);
  } else if (a.table) {
    if (a.d <= 64 && many) launch_tiles<T, 64, 2, 64, kRelative, SEQUENCES>(launch, a, stream);
    else if (a.d <= 64) launch_tiles<T, 64, 1, 64, kRelative, SEQUENCES>(launch, a, stream);
    else launch_tiles<T, 128, 1, 64, kRelative, SEQUENCES>(launch, a, stream);
  } else {
    if (a.d <= 64 && many) launch_tiles<T, 64, 2, 64, kNone, SEQUENCES>(launch, a, stream);
    else if (a.d <= 64) launch_tiles<T, 64, 1, 64, kNone, SEQUENCES>(launch, a, stream);
    else if (a.d <= 96) launch_tiles<T, 96, 1, 64, kNone, SEQUENCES>(launch, a, stream);
    else if (a.d <= 128) launch_tiles<T, 128, 1, 64, kNone, SEQUENCES>(launch, a, stream);
    else launch_tiles<T, 256, 1, 32, kNone, SEQUENCES>(launch, a, stream);
  }
}

template <bool SEQUENCES>
void attend_many(const char* what, const AttentionPointers& p, int multiprocessors, int dtype, int device, addr stream) {
  const auto& n = *(const AttentionLayout*)p.layout;
  const Launch launch{what, (SEQUENCES ? 1 : n.batch) * n.heads * n.query_length, n.head_size, device};
  if (has_no_work(n)) return;
  const OnDevice guard(launch);
  if (dtype == 0) {
    attention_float32(launch, p, false, n.key_length, stream);
  } else {
    const Attention a = arguments(p, false, n.key_length, 2);
    if (dtype == 1) by_case<__half, SEQUENCES>(launch, a, multiprocessors, stream);
    else by_case<PYFUSED_BFLOAT16, SEQUENCES>(launch, a, multiprocessors, stream);
  }
  launch.check();
}

}  // namespace
}  // namespace pyfused::cuda
