// Where does a kernel read T5's relative bias? Each head has a row of floats by distance, made once per call.
//
// The bias of a row of scores is a contiguous piece of it: no Sq x Sk tensor, and one vector load per vector of scores.
// Distances from `span` on share a bucket, so rows have at most 2 span + 1 values, whatever the lengths.
#pragma once

#include <cstdlib>

#include "kernels.h"
#include "pyfused/simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

inline float* floats(int64_t n) {
  return (float*)std::aligned_alloc(64, ((n > 0 ? n : 1) * sizeof(float) + 63) / 64 * 64);
}

// The bias at x = sign * (key position - query position), least <= x <= most, in pieces of `lanes` ascending x.
struct ByDistance {
  float* rows = nullptr;  // (heads, length)
  int64_t first = 0, last = 0, lanes = 0, length = 0, heads = 0, span = 0, sign = 0;
  const int32_t* buckets = nullptr;  // of the distances -span .. span, from kernels/shared/buckets.py

  ByDistance() = default;
  ByDistance(addr buckets, int64_t span, int64_t heads, int64_t least, int64_t most, int64_t sign, int64_t lanes)
      : first(clamp(least, -span, span)), last(clamp(most, -span, span)), lanes(lanes),
        length(last - first + 2 * lanes - 1), heads(heads), span(span), sign(sign), buckets((const int32_t*)buckets) {}

  static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }

  // The offset in a row of the piece x .. x + lanes - 1. A row repeats its end values at both ends.
  int64_t offset(int64_t x) const { return clamp(x, first - lanes + 1, last) - first + lanes - 1; }
  const float* at(int64_t head, int64_t x) const { return rows + head * length + offset(x); }
  int64_t bucket(int64_t i) const { return buckets[span + sign * clamp(first - lanes + 1 + i, first, last)]; }

  template <class T> void fill(const T* table, int64_t bucket_step, int64_t head_step) {
    rows = floats(heads * length);
    for (int64_t i = 0; i < length; ++i) {
      const T* from = table + bucket(i) * bucket_step;
      for (int64_t h = 0; h < heads; ++h) rows[h * length + i] = load_one(from + h * head_step);
    }
  }

  // Adds a head's sums by distance, laid out like a row, to grad_table (num_buckets, heads). A bucket's distances are
  // neighbours.
  template <class Sum> void add_buckets(int64_t head, float* grad_table, const Sum& sum) const {
    for (int64_t i = 0; i < length;) {
      const int64_t now = bucket(i);
      double total = 0;
      for (; i < length && bucket(i) == now; ++i) total += sum(i);
      grad_table[now * heads + head] = (float)total;
    }
  }
};

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
