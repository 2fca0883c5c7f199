// How does decode multiply by a weight that memory holds transposed, (K, N), as transformers' GPT-2 does? As decode_product.cuh,
// with another division of W.
//
// A tile is four lanes' 16 bytes of outputs side by side, 64 bytes: whole sectors, and four lanes for each of the load unit's
// lines; with less, requests would hold up what others wait for. A warp's step is 32 rows of memory, 2 KB, in the same ring. So a
// lane sums its own outputs, every eighth row. All warps of a block share a tile; each has a stretch of K.
//
// 768 outputs are 24 tiles, too few for the chip. Where the result is a branch, up to kMostParts blocks share a tile: each
// writes the sums of its part of K, and whoever adds the branch to the stream adds the parts in order. Parts depend on the
// shape alone, so the result does not depend on the number of blocks, to the last bit.
#pragma once

#include "decode_product.cuh"

#include "pyfused/few_rows_columns.cuh"

namespace pyfused {

constexpr int kMostParts = 4;  // GPT-2 124M's 3072 to 768 then has 96 blocks, with all that they read in the ring

namespace {

// Where a product's sums are by rows it is DecodeProduct, with one part.
template <class T, int ROWS, Form FORM> struct DecodeColumns : DecodeProduct<T, ROWS, FORM> {
  using Base = DecodeProduct<T, ROWS, FORM>;
  using Base::a, Base::m, Base::warp, Base::lane, Base::warps, Base::sums, Base::operand;
  using Base::phase, Base::int8, Base::gated, Base::first, Base::last, Base::width, Base::splits, Base::rounds, Base::n,
      Base::k, Base::begin, Base::end, Base::fits, Base::parts, Base::steps, Base::share;
  static constexpr int V = 16 / sizeof(T), kTile = kColumns * V, kApart = kWarp / kColumns, kStep = kColumns * kApart;

  // An item is a part of a tile; the block's are first .. last - 1, one in each round.
  bool by_columns;

  // The next step to request, its slot, and this lane's outputs in row 0 of memory.
  struct Ahead {
    int round, step, end, filled;
    const T* own;
    int64_t apart;
  };

  __device__ explicit DecodeColumns(const DecodeArguments& arguments, unsigned char* shared) : Base(arguments, shared) {}

  __device__ int operand_bits() const { return by_columns ? 2 : this->vector_bits(int8); }  // with 2 in x's own order

  __device__ void request(Phase which, const DecodeLayer& layer) {
    this->set(which, layer);
    by_columns = FORM == Form::kAny ? this->matrices->kind == kByColumns : FORM == Form::kColumns && which != Phase::kLogits;
    parts = 1;
    if (!by_columns) return Base::request();
    int8 = false;
    this->divide_once([&] { divide(); });
    if (fits && this->is_wide()) {
      const Source source = this->source();
      const DecodeMatrix& matrix = this->matrices[source.matrix];
      const char* own = source.row < 0 ? nullptr : (const char*)((const T*)matrix.weight + source.row);
      const int64_t apart = matrix.stride * sizeof(T);
#pragma unroll 1
      for (int step = begin; step < end; ++step)
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const int at = row_of(step, i);
          const bool inside = own && at < k;
          cp_async16(this->slot(step - begin, i), inside ? own + at * apart : (const char*)a.result[0], inside);
        }
      cp_async_commit();
      if (warp == warps - 1 && own && matrix.bias) prefetch_l2((const T*)matrix.bias + source.row);
    } else {
      Ahead ahead = ahead_from(0);
#pragma unroll 1
      for (int i = 0; i < kDepth; ++i) request_step(ahead);
    }
  }

  __device__ void divide() {
    width = gated ? kTile / 2 : kTile;
    const int tiles = quotient(n - 1, width) + 1;
    steps = (k - 1) / kStep + 1, splits = min(warps, steps);
    const bool is_branch = phase == Phase::kOutput || phase == Phase::kCrossOutput || phase == Phase::kDown;
    if (is_branch) parts = max(1, min(min(quotient(kTilesWanted / kDecodeWarps, tiles), quotient(steps, splits)), kMostParts));
    share = quotient(steps - 1, splits * parts) + 1;
    this->find_share(tiles * parts);
    rounds = last - first, begin = end = 0;
    if (rounds > 0) find_stretch(0, begin, end);
    fits = rounds <= 1 && end - begin <= kDepth;
    if (lane < kColumns) {
      Source source{-1, 0};
      if (const int feature = feature_of(0); rounds > 0 && feature < n) {
        int row;
        const DecodeMatrix& matrix = this->matrix_of(feature, is_second(), row);
        source = {row, (int)(&matrix - this->matrices)};
      }
      this->source() = source;
    }
  }

  // Calls put(part, row, feature, value, up) for every sum of the block. The value is that of a part; the first has the bias.
  template <class Put> __device__ void multiply(const Put& put) {
    if (!by_columns)
      return Base::multiply([&](int row, int feature, float value, float up) { put(0, row, feature, value, up); });
    const bool is_there = fits && this->is_wide();  // as in Base::multiply_as()
    int used = 0;
    Ahead ahead;
    if (is_there) cp_async_wait<0>();
    else ahead = ahead_from(kDepth);
    for (int round = 0; round < rounds; ++round) {
      int step, last_step;
      find_stretch(round, step, last_step);
      typename Base::Terms of_value, of_up;  // of this thread's first result. They arrive during the product
      find_terms(first + round, threadIdx.x, of_value, of_up);
      float sum[ROWS * V] = {};
      for (; step < last_step; ++step) {
        Pack<T, V> w[kColumns];
        if (!is_there) cp_async_wait<kDepth - 1>();
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
          w[i] = load<V>((const T*)this->slot(used, i));
        if (!is_there) request_step(ahead);
        used = used + 1 == kDepth ? 0 : used + 1;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) add_columns<V, ROWS>(sum, w[i], operand + row_of(step, i), a.pitch, m);
      }
      float* total = sums + round % 2 * warps * ROWS * kTile;  // [warp][row][column]
      store_columns<V, kColumns, ROWS>(sum, total + warp * ROWS * kTile);
      __syncthreads();
      finish(first + round, total, of_value, of_up, put);
    }
    cp_async_commit();  // as in Base::multiply()
    cp_async_wait<0>();
  }

 private:
  // The row of memory of this lane's access i in a step.
  __device__ int row_of(int step, int i) const { return step * kStep + i * kApart + lane / kColumns; }

  // The first of this lane's features in a round. The upper two of four lanes have inner's, if gated.
  __device__ int feature_of(int round) const {
    return quotient(first + round, parts) * width + lane % (gated ? kColumns / 2 : kColumns) * V;
  }
  __device__ bool is_second() const { return gated && lane % kColumns >= kColumns / 2; }

  // This warp's steps of a round.
  __device__ void find_stretch(int round, int& begin, int& end) const {
    const int part = first + round - quotient(first + round, parts) * parts;
    begin = (part * splits + warp) * share, end = warp < splits ? min(begin + share, steps) : 0;
  }

  // What is to be requested behind the first `done` steps, whole rings.
  __device__ Ahead ahead_from(int done) const {
    Ahead ahead{-1, 0, 0, 0, nullptr, 0};
    next_item(ahead);
    while (done > 0 && ahead.step < ahead.end) {
      const int of_item = min(done, ahead.end - ahead.step);
      done -= of_item, ahead.step += of_item;
      if (ahead.step == ahead.end) next_item(ahead);
    }
    return ahead;
  }

  // The next round in which this warp has steps to request. Without one `step` is not below `end`.
  __device__ void next_item(Ahead& ahead) const {
    ahead.own = nullptr;
    do {
      if (++ahead.round >= rounds) {
        ahead.step = ahead.end = 0;
        return;
      }
      find_stretch(ahead.round, ahead.step, ahead.end);
    } while (ahead.step >= ahead.end);
    if (const int feature = feature_of(ahead.round); feature < n) {
      int row;
      const DecodeMatrix& matrix = this->matrix_of(feature, is_second(), row);
      ahead.own = (const T*)matrix.weight + row, ahead.apart = matrix.stride;
    }
  }

  __device__ void request_step(Ahead& ahead) const {
    if (ahead.step < ahead.end) {
      if (this->is_wide()) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const int at = row_of(ahead.step, i);
          const bool inside = ahead.own && at < k;
          cp_async16(this->slot(ahead.filled, i), inside ? ahead.own + at * ahead.apart : (const T*)a.result[0], inside);
        }
      } else {  // not aligned, or not of one matrix
#pragma unroll 1
        for (int i = 0; i < kTile; ++i)
          ((T*)this->slot(ahead.filled, i / V))[i % V] = weight(feature_of(ahead.round) + i % V, row_of(ahead.step, i / V));
      }
      if (++ahead.step == ahead.end) next_item(ahead);
    }
    cp_async_commit();
    ahead.filled = ahead.filled + 1 == kDepth ? 0 : ahead.filled + 1;
  }

  __device__ T weight(int feature, int at) const {
    if (at >= k || feature >= n) return narrow<T>(0.0f);
    int row;
    const DecodeMatrix& matrix = this->matrix_of(feature, is_second(), row);
    return ((const T*)matrix.weight)[at * matrix.stride + row];
  }

  // The terms of result i of an item, if there is one. The first part of a tile has them.
  __device__ void find_terms(int item, int i, typename Base::Terms& of_value, typename Base::Terms& of_up) const {
    const int tile = quotient(item, parts), feature = tile * width + i - quotient(i, width) * width;
    if (item > tile * parts || i >= m * width || feature >= n) return;
    of_value = this->terms(feature, false);
    if (gated) of_up = this->terms(feature, true);
  }

  // Adds the warps' sums of an item in order.
  template <class Put>
  __device__ void finish(int item, const float* total, typename Base::Terms of_value, typename Base::Terms of_up,
                         const Put& put) const {
    const int tile = quotient(item, parts);
    for (int i = threadIdx.x; i < m * width; i += blockDim.x) {
      const int row = quotient(i, width), at = i - row * width, feature = tile * width + at;
      if (i >= (int)blockDim.x) find_terms(item, i, of_value, of_up);
      if (feature >= n) continue;
      float value = 0, up = 0;
      const float* sum = total + row * kTile + at;
#pragma unroll 2
      for (int w = 0; w < splits; ++w, sum += ROWS * kTile) {
        value += sum[0];
        if (gated) up += sum[width];
      }
      put(item - tile * parts, row, feature, of_value.of(value), of_up.of(up));
    }
  }
};

}  // namespace
}  // namespace pyfused
