// How is y = x W^T + b computed for few rows if W is stored transposed, (K, N), like the weights of Hugging Face's Conv1D?
//
// y[j] += x[c] stored[c][j], for kStreams rows c and up to kChunk outputs j at a time. The rows lie K / kStreams apart, so
// memory is read as kStreams long streams: 16 GB/s on one Zen 3 core, as gemm.h's gemv. With neighbouring rows, or pieces of 512
// outputs, it was 10. The sums stay in L1, for several rows of x in L2. In bfloat16 and float16 torch has no fast product for
// this layout.
#pragma once

#include "gemm.h"

namespace pyfused::PYFUSED_ISA {

// A Product whose weight is (k, n), weight_stride elements from row to row.
template <class T, class X = T> struct ColumnsProduct : Product<T, X> {
  using Base = Product<T, X>;
  using Base::k, Base::m, Base::n, Base::packed, Base::scratch, Base::weight, Base::weight_stride, Base::x, Base::x_stride;

  static constexpr int64_t kMost = 8;  // most rows of x; gemm_columns.h multiplies more
  static constexpr int64_t kChunk = 3072;
  static constexpr int64_t kUnit = 64;
  static constexpr int kStreams = 8;
  static constexpr int64_t kDepth = 32 * kStreams;  // most products summed in one chain: longer chains lose bits

  ColumnsProduct of_rows(int64_t i, int64_t count) const { return {Base::of_rows(i, count)}; }
  int64_t packed_size() const { return m * k; }
  int64_t scratch_size() const { return 2 * m * kChunk; }
  int64_t pack_items() const { return m; }
  int64_t run_items() const { return (n + kUnit - 1) / kUnit; }
  int64_t run_work() const { return kUnit * k * m; }

  void pack(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const X* from = x + i * x_stride;
      float* to = packed + i * k;
      int64_t c = 0;
      for (; c + kWidth <= k; c += kWidth) store(to + c, load(from + c));
      for (; c < k; ++c) to[c] = load_one(from + c);
    }
  }

  void run(int share, int64_t begin, int64_t end) const {
    float *totals = scratch + share * scratch_size(), *sums = totals + m * kChunk;
    const int64_t last = end * kUnit < n ? end * kUnit : n;
    for (int64_t j = begin * kUnit; j < last; j += kChunk) {
      const int64_t count = last - j < kChunk ? last - j : kChunk;
      column_sums(j, count, totals, sums);
      this->finish(0, m, j, count, totals, kChunk);
    }
  }

  // totals[i][r], rows kChunk apart: the sum over k for row i and output j + r. `sums` is scratch of the same size.
  void column_sums(int64_t j, int64_t count, float* totals, float* sums) const {
    const int64_t apart = k / kStreams;
    each_sum(count, [&](int64_t q) { store(totals + q, vfloat{}); });
    for (int64_t c = 0; c < apart || c == 0;) {
      const int64_t stop = apart - c < kDepth / kStreams ? apart : c + kDepth / kStreams;
      each_sum(count, [&](int64_t q) { store(sums + q, vfloat{}); });
      for (; c < stop; ++c) rows<kStreams>(c, apart, j, count, sums);
      if (c == apart)
        for (int64_t rest = apart * kStreams; rest < k; ++rest) rows<1>(rest, 0, j, count, sums);
      each_sum(count, [&](int64_t q) { store(totals + q, load(totals + q) + load(sums + q)); });
      if (!apart) break;
    }
  }

  // Calls body with the place of every vector of sums.
  template <class Body> PYFUSED_INLINE void each_sum(int64_t count, const Body& body) const {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t q = 0; q < count; q += kWidth) body(i * kChunk + q);
  }

  // sums (+)= the products of the stored rows c, c + apart, ... (R of them) with every row of x, four rows of x at a time.
  template <int R> void rows(int64_t c, int64_t apart, int64_t j, int64_t count, float* sums) const {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) tile<4, R>(i, c, apart, j, count, sums);
    switch (m - i) {
      case 1: tile<1, R>(i, c, apart, j, count, sums); break;
      case 2: tile<2, R>(i, c, apart, j, count, sums); break;
      case 3: tile<3, R>(i, c, apart, j, count, sums); break;
    }
  }

  template <int MB, int R> void tile(int64_t i, int64_t c, int64_t apart, int64_t j, int64_t count, float* sums) const {
    const T* w = weight + c * weight_stride + j;
    const float* px = packed + i * k + c;
    const int64_t stream = apart * weight_stride;
    float* out = sums + i * kChunk;
    vfloat factor[MB][R];
#pragma GCC unroll 8
    for (int a = 0; a < MB; ++a)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) factor[a][r] = splat(px[a * k + r * apart]);
    auto step = [&](int64_t q, auto get) __attribute__((always_inline)) {
      vfloat v[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) v[r] = get(w + r * stream + q);
#pragma GCC unroll 8
      for (int a = 0; a < MB; ++a) {
        vfloat sum = factor[a][0] * v[0];
#pragma GCC unroll 8
        for (int r = 1; r < R; ++r) sum += factor[a][r] * v[r];
        store(out + a * kChunk + q, load(out + a * kChunk + q) + sum);
      }
    };
    int64_t q = 0;
    for (; q + kWidth <= count; q += kWidth) step(q, [](const T* p) { return load(p); });
    if (q < count) step(q, [rest = count - q](const T* p) { return load_partial(p, rest); });
  }
};

}  // namespace pyfused::PYFUSED_ISA
