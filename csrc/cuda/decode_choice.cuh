// How does decode choose the likeliest token, in its own kernel? decode_draw.cuh draws one instead.
#pragma once

#include "decode_attention.cuh"

namespace pyfused {
namespace {

template <class T, int ROWS, Form FORM> struct DecodeChoice : DecodeAttention<T, ROWS, FORM> {
  using Base = DecodeAttention<T, ROWS, FORM>;
  using Base::a, Base::m, Base::warp, Base::lane, Base::warps, Base::sums, Base::kSums;

  Top top{-INFINITY, 0x7fffffff};  // of the logits that this lane wrote, all of one row

  __device__ DecodeChoice(const DecodeArguments& arguments, unsigned char* shared) : Base(arguments, shared) {}

  // Writes the likeliest tokens of all rows. The grid waits once. -1 where the largest logit is not finite.
  __device__ void choose() {
    put_top();
    this->barrier.arrive();
    this->barrier.wait("logits");
    for (int row = blockIdx.x; row < m; row += gridDim.x) {
      const Top best = best_of(row);
      if (threadIdx.x == 0) ((int64_t*)a.call.chosen)[row] = fabsf(best.value) < INFINITY ? best.token : -1;
    }
  }

 private:
  // The likeliest token of each row among the block's.
  __device__ void put_top() const {
    float* values = sums;
    int* tokens = (int*)(values + warps * kSums);
    __syncthreads();  // the product's sums have been read
    if (lane < kSums) values[warp * kSums + lane] = top.value, tokens[warp * kSums + lane] = top.token;
    __syncthreads();
    if ((int)threadIdx.x < m) {
      Top best{-INFINITY, 0x7fffffff};
      for (int w = 0; w < warps; ++w)
        for (int c = 0; c < kColumns; ++c) {
          const int at = w * kSums + threadIdx.x * kColumns + c;
          best = better(best, {values[at], tokens[at]});
        }
      a.top[blockIdx.x * m + threadIdx.x] = best.value, a.winner[blockIdx.x * m + threadIdx.x] = best.token;
    }
  }

  // The likeliest token of a row. Each warp finds it for itself.
  __device__ Top best_of(int row) const {
    Top best{-INFINITY, 0x7fffffff};
    constexpr int AT_ONCE = 5;  // one trip to the L2 for up to 160 blocks
    for (int first = lane; first < (int)gridDim.x; first += AT_ONCE * kWarp) {
      Top found[AT_ONCE];
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) {
        const int at = min(first + u * kWarp, (int)gridDim.x - 1) * m + row;  // the last one again and again does no harm
        found[u] = {__ldcg(a.top + at), __ldcg(a.winner + at)};
      }
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) best = better(best, found[u]);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      best = better(best, {__shfl_xor_sync(kAllLanes, best.value, offset), __shfl_xor_sync(kAllLanes, best.token, offset)});
    return best;
  }
};

}  // namespace
}  // namespace pyfused
