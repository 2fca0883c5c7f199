// How is y = x W^T + b computed for many rows if W is stored transposed, (K, N), like the weights of Hugging Face's Conv1D?
//
// With gemm.h's tiles, and x and W in each other's roles. There a tile reads rows of W, and panels of x that were transposed. Here
// it reads rows of x, and panels of W: 32 outputs for each K. Memory holds those outputs together, so W is widened and copied but
// not transposed, and the sums lie in the order of y.
//
// A slab of W, 768 of K x 128 outputs, is packed into 384 KB of L2. Of 128 rows, 768 x 2304 in bfloat16 takes 3.2 ms on an Emerald
// Rapids core with AVX-512: the tiles alone 2.8 ms, 160 GFLOP/s of 178. While they multiply a slab they fetch the next one, which
// makes 128 rows 1.05 times as fast and 16 rows 1.15. Other sizes of a slab, from 768 x 64 to 256 x 256, are as fast within 3%.
// float32 has twice as much to read: 3.5 ms, where MKL takes 3.0. A panel of K x 32 at a time reads W in pieces of one line, each
// in another page: 1.1 times as slow.
#pragma once

#include "gemm.h"
#include "gemm_tiles.h"

namespace pyfused::PYFUSED_ISA {

// Rows of memory that a tile fetches into L2 while it runs, a line or two each, evenly over its steps.
template <class T> struct NextRows {
  const T* at;
  int64_t stride, every, wait;  // a row each `every` steps

  PYFUSED_INLINE void operator()() {
    if (--wait > 0) return;
    wait = every;
    for (size_t c = 0; c < kPanel; c += 64 / sizeof(T)) __builtin_prefetch(at + c, 0, 2);
    at += stride;
  }
};

// The sums over k of x (m, k), packed in rows of row_size(k), times weight (k, n). As the kernels of sums.h, run() is compiled once
// for an instruction set.
template <class W> struct PanelSums {
  const float* packed;
  const W* weight;
  int64_t m, k, weight_stride;

  static constexpr int64_t kOutputs = 128, kSlab = kManyRegisters ? 768 : 384;
  // Rows of x in a tile. 16 rows are two small tiles: large and small together would be 4 more.
  static constexpr int kThird = kWeightRows / 3, kSmall = 2 * kThird, kLarge = 3 * kThird;

  int64_t padded_rows() const { return m > kSmall ? (m + kThird - 1) / kThird * kThird : kSmall; }
  int64_t slab() const { return k > kSlab ? (k + slabs() - 1) / slabs() : k; }
  int64_t slabs() const { return (k + kSlab - 1) / kSlab; }
  // Floats from a row of packed x to the next: an odd number of lines, so that the rows of a tile lie in different sets of L1.
  static int64_t row_size(int64_t k) { return ((k + 15) / 16 | 1) * 16; }

  // sums[i][r], rows kOutputs apart: the sum for row i and output j + r, up to kOutputs of them. Rows past m, up to padded_rows(),
  // are zeros. `last`: the end of the outputs that will be asked for. `panels` is scratch for a slab.
  void run(int64_t j, int64_t count, int64_t last, float* sums, float* panels) const;

  template <class Body> PYFUSED_INLINE void each_tile(const Body& body) const {
    for (int64_t i = 0; i < padded_rows();) {
      const int64_t rest = padded_rows() - i;
      if (rest == kLarge || rest > 2 * kSmall) body(i, std::integral_constant<int, kLarge>{}), i += kLarge;
      else body(i, std::integral_constant<int, kSmall>{}), i += kSmall;
    }
  }

  // A panel holds (depth, width). The last panel of a block is one vector wide if its outputs fit.
  void pack_slab(int64_t j, int64_t count, int64_t begin, int64_t depth, float* panels) const {
    for (int64_t o = 0; o < count; o += kPanel) {
      const W* from = weight + begin * weight_stride + j + o;
      float* to = panels + o * depth;
      const int64_t width = Sums<W, Elements>::width_of(count - o), rest = count - o;
      if (rest >= kPanel) {
#pragma GCC unroll 4
        for (int64_t c = 0; c < depth; ++c, from += weight_stride, to += kPanel)
          store(to, load(from)), store(to + kWidth, load(from + kWidth));
        continue;
      }
      for (int64_t c = 0; c < depth; ++c, from += weight_stride, to += width)
        for (int64_t v = 0; v < width; v += kWidth)
          store(to + v, rest - v >= kWidth ? load(from + v) : load_partial(from + v, rest - v));
    }
  }

  // The tiles of a panel fetch the same outputs of the next slab, each some of its rows.
  template <int R>
  void tile(int64_t i, int64_t o, int64_t count, int64_t c, int64_t depth, const float* panels, float* sums, const W* next) const {
    const float *rows = packed + i * row_size(k) + c, *panel = panels + o * depth;
    const int64_t apart = row_size(k) * sizeof(float), every = padded_rows() / R;
    NextRows<W> ahead{weight, weight_stride, every, INT64_MAX};
    if (next) ahead.at = next + o + depth * i / padded_rows() * weight_stride, ahead.wait = 1;
    float* out = sums + i * kOutputs + o;
    count - o > kWidth ? outer_tile<Elements, 2, R>(rows, apart, panel, depth, out, kOutputs, c == 0, ahead)
                       : outer_tile<Elements, 1, R>(rows, apart, panel, depth, out, kOutputs, c == 0, ahead);
  }
};

template <class W> void PanelSums<W>::run(int64_t j, int64_t count, int64_t last, float* sums, float* panels) const {
  for (int64_t c = 0; c < k || c == 0; c += slab()) {
    const int64_t depth = k - c < slab() ? k - c : slab();
    pack_slab(j, count, c, depth, panels);
    const W* next = c + depth < k ? weight + (c + depth) * weight_stride + j : weight + j + kOutputs;
    if (c + depth == k && j + kOutputs >= last) next = nullptr;
    each_tile([&](int64_t i, auto rows) {
      for (int64_t o = 0; o < count; o += kPanel) tile<rows>(i, o, count, c, depth, panels, sums, next);
    });
  }
}

extern template struct PanelSums<float>;
extern template struct PanelSums<f16>;
extern template struct PanelSums<bf16>;

// A Product whose weight is (k, n), weight_stride elements from row to row.
template <class T> struct PackedColumnsProduct : Product<T, T, T, Elements> {
  using Base = Product<T, T, T, Elements>;
  using Base::activation, Base::bias, Base::k, Base::m, Base::n, Base::packed, Base::scratch, Base::weight, Base::weight_stride,
      Base::x, Base::x_stride;

  static constexpr int64_t kBlockM = 128;

  // A Product of bfloat16 may be one of Pairs, if the builder's own flags allow it.
  template <class M>
  PackedColumnsProduct(const Product<T, T, T, M>& p)
      : Base{p.x, p.weight, p.bias, p.residual, p.y, p.pre, p.m, p.n, p.k, p.x_stride, p.weight_stride, p.residual_stride,
             p.activation, p.scale, p.packed, p.scratch} {}

  PackedColumnsProduct of_rows(int64_t i, int64_t count) const { return {Base::of_rows(i, count)}; }
  PanelSums<T> summed() const { return {packed, weight, m, k, weight_stride}; }
  static int64_t row_size(int64_t k) { return PanelSums<T>::row_size(k); }
  int64_t padded_rows() const { return summed().padded_rows(); }

  int64_t packed_size() const { return padded_rows() * row_size(k); }
  int64_t scratch_size() const { return PanelSums<T>::kOutputs * (padded_rows() + summed().slab()); }
  int64_t pack_items() const { return padded_rows(); }
  int64_t run_items() const { return (n + kPanel - 1) / kPanel; }
  int64_t run_work() const { return kPanel * k * m; }

  void pack(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      float* to = packed + i * row_size(k);
      for (int64_t c = 0; c < k; c += kWidth)
        store(to + c, i < m ? Elements::lanes(x + i * x_stride + c, k - c, 0) : vfloat{});
    }
  }

  void run(int share, int64_t begin, int64_t end) const {
    const int64_t last = end * kPanel < n ? end * kPanel : n;
    each_block(begin * kPanel, last, scratch + share * scratch_size(), [&](int64_t j, int64_t count, const float* sums) {
      this->ending().rows(0, m, j, count, sums, PanelSums<T>::kOutputs);
    });
  }

  // Instead of run(), as in gemm.h: activation(x weight^T + bias) becomes the packed rows of a product that multiplies it.
  void run_into(float* rows) const {
    each_block(0, n, scratch, [&](int64_t j, int64_t count, const float* sums) {
      PYFUSED_BY_ACTIVATION(activation, for (int64_t i = 0; i < padded_rows(); ++i)
        row_into<A>(rows + i * row_size(n) + j, j, count, sums + i * PanelSums<T>::kOutputs);)
    });
  }

  // What is written past a row is inside its last line, and nobody reads it.
  template <class A> void row_into(float* to, int64_t j, int64_t count, const float* sums) const {
    for (int64_t c = 0; c < count; c += kWidth) {
      vfloat v = load(sums + c);
      if (bias) v += count - c >= kWidth ? load(bias + j + c) : load_partial(bias + j + c, count - c);
      store(to + c, A::value(v));
    }
  }

  // Calls done(j, count, the sums for outputs [j, j + count)).
  template <class Done> PYFUSED_INLINE void each_block(int64_t first, int64_t last, float* sums, const Done& done) const {
    const PanelSums<T> product = summed();
    float* panels = sums + product.kOutputs * padded_rows();
    for (int64_t j = first; j < last; j += product.kOutputs) {
      const int64_t count = last - j < product.kOutputs ? last - j : product.kOutputs;
      product.run(j, count, last, sums, panels);
      done(j, count, sums);
    }
  }
};

}  // namespace pyfused::PYFUSED_ISA
