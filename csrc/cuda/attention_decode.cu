// attention on CUDA, few queries and many keys: at most 16 rows, which are the queries of all heads that share a key head.
//
// Moves keys and values once: 2 B Hkv Sk D elements with 4 FLOPs for each element and row, so it is memory-bound. B8 H32
// Hkv8 S4096 D128, 16 bits: 134 MB, predicted 48 us at 3.0 TB/s with 6 us for launches, fill and combination; GPT-2's B1
// H12 S1024 D64: 3 MB, predicted 4 us, of which 1 is memory. An H200 took 14 us, Triton 15.6 and cuDNN 10.3.
//
// Tiling: a block takes a chunk of keys, so a few heads fill the chip. Four warps share each tile, 16 keys each. All rows
// are in one mma tile: 16 rows cost the tensor cores as much as one, and memory stays the limit. A ring of three tiles
// keeps at least 32 KB of reads under way on every multiprocessor. A second kernel adds several chunks in order, without
// atomics, so the result is bitwise repeatable.
#include "attention_tile.cuh"

namespace pyfused::cuda {
namespace {

constexpr int kCombineThreads = 64;

// ---- kernels --------------------------------------------------------------------------------------------------------
// One block per row adds its chunks in order, weighted by their sums.
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(Attention a, const float* part, const float* part_lse, int chunks) {
  const int64_t rows = (int64_t)a.b * a.h * a.sq, row = blockIdx.x;
  float peak = kNever, total = 0;
  for (int c = 0; c < chunks; ++c)  // +inf marks a chunk in which the query sees no key
    if (const float lse = part_lse[c * rows + row]; lse != INFINITY) peak = fmaxf(peak, lse);
  for (int c = 0; c < chunks; ++c)
    if (const float lse = part_lse[c * rows + row]; lse != INFINITY) total += expf(lse - peak);
  const int query = (int)(row % a.sq), head = (int)(row / a.sq % a.h);
  const int64_t batch = row / a.sq / a.h;
  T* out = (T*)a.out + batch * a.out_stride[0] + head * a.out_stride[1] + query * a.out_stride[2];
  for (int at = threadIdx.x; at < a.d; at += kCombineThreads) {
    float sum = 0;
#pragma unroll 8
    for (int c = 0; c < chunks; ++c) {
      const float lse = part_lse[c * rows + row], v = part[(c * rows + row) * a.d + at];
      sum += lse != INFINITY ? v * expf(lse - peak) : 0.0f;
    }
    out[at] = narrow<T>(total == 0.0f ? 0.0f : sum / total);
  }
  if (a.lse && threadIdx.x == 0) a.lse[row] = total == 0.0f ? INFINITY : peak + logf(total);
}

// ---- launchers ------------------------------------------------------------------------------------------------------
template <class T, int D, int WN, int STAGES, bool ALIGNED>
void launch_decode(const Launch& launch, const Attention& a, addr stream) {
  constexpr int kTile = WN * 16, kTiles = tile_bytes<1, 1, kTile, STAGES, D>(), kMerge = merge_bytes<WN, D>();
  const int tiles = kTiles + distances(a) * (int)sizeof(float);
  const size_t bytes = tiles > kMerge ? tiles : kMerge;
  auto kernel = attention_kernel<T, D, 1, 1, WN, kTile, STAGES, Extras::kAny, false, ALIGNED>;
  allow_shared(launch, kernel, bytes);
  const dim3 grid(launch.blocks((int64_t)a.b * a.h / a.pack), (unsigned)up(a.sk, a.chunk));
  PYFUSED_LAUNCH(kernel, grid, WN * kWarp, bytes, stream, a);
}

template <class T, bool ALIGNED> void by_head_size(const Launch& launch, const Attention& a, addr stream) {
  if (a.d <= 64) launch_decode<T, 64, 4, 3, ALIGNED>(launch, a, stream);
  else if (a.d <= 128) launch_decode<T, 128, 4, 2, ALIGNED>(launch, a, stream);
  else launch_decode<T, 256, 2, 2, ALIGNED>(launch, a, stream);
}

template <class T> void by_alignment(const Launch& launch, const Attention& a, addr stream) {
  if (a.aligned) by_head_size<T, true>(launch, a, stream);
  else by_head_size<T, false>(launch, a, stream);
}

}  // namespace

void attention_decode_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets,
                              addr seed, addr cu_seqlens, addr out, addr lse, addr layout, int64_t chunk, int dtype,
                              int device, addr stream) {
  const AttentionPointers p{query, key, value, mask, bias, table, buckets, seed, 0, out, lse, layout};
  const auto& n = *(const AttentionLayout*)layout;
  const Launch launch{"attention forward", n.batch * n.heads * n.query_length, n.head_size, device};
  if (has_no_work(n) || chunk == 0) return;
  const OnDevice guard(launch);
  if (dtype == 0) {
    attention_float32(launch, p, true, chunk, stream);
  } else {
    const Attention a = arguments(p, true, chunk, 2);
    if (dtype == 1) by_alignment<__half>(launch, a, stream);
    else by_alignment<PYFUSED_BFLOAT16>(launch, a, stream);
  }
  launch.check();
}

void attention_combine(addr part, addr part_lse, addr out, addr lse, addr layout, int64_t chunks, int dtype, int device,
                       addr stream) {
  const auto& n = *(const AttentionLayout*)layout;
  const Launch launch{"attention combine", n.batch * n.heads * n.query_length, n.head_size, device};
  if (has_no_work(n)) return;
  const OnDevice guard(launch);
  PYFUSED_BY_DTYPE(dtype, {
    const Attention a = arguments({0, 0, 0, 0, 0, 0, 0, 0, 0, out, lse, layout}, false, n.key_length, sizeof(T));
    auto kernel = combine_kernel<T>;
    PYFUSED_LAUNCH(kernel, launch.blocks(launch.rows), kCombineThreads, 0, stream, a, (const float*)part,
                   (const float*)part_lse, (int)chunks);
  })
  launch.check();
}

}  // namespace pyfused::cuda
