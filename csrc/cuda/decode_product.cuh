// How does decode multiply its few rows by a weight matrix, all blocks together? y = x W^T, as parts of a persistent kernel.
//
// The operand x lies in every block's shared memory as float32. A block owns a stretch of features, four at a time for a warp
// (a tile); `splits` warps share a tile, each with a stretch of K, and one of them adds their sums in order. Splits depend on
// the shape alone, so the result does not depend on the number of blocks, to the last bit.
//
// A step of a warp is 16 bytes of each of four rows of W per lane: 2 KB. Each lane copies its own pieces into its own slots of
// a ring in shared memory (cp.async), kDepth steps ahead, and nobody else reads them: no barrier, no registers. The first
// kDepth steps are requested before the grid barrier that the operand waits for. With 256 threads that is 64 KB on each
// multiprocessor, all that a phase of GPT-2 124M reads there (9 to 36 KB).
//
// Shared memory serves 4 FMAs with one float of x. With 8 rows and 16-bit weights at 3 TB/s that is 52 FMAs a cycle of 128,
// and 13 floats of 32.
#pragma once

#include "pyfused/activation.cuh"
#include "pyfused/cooperative.cuh"
#include "pyfused/decode_plan.h"
#include "pyfused/few_rows.cuh"

namespace pyfused {

constexpr int kMostAddresses = 400;   // of caches; all arguments of a kernel take at most 4 KB
constexpr int kDecodeWarps = 8;       // most warps of a block: a thread has up to 255 registers
constexpr int kMostRows = 8;
constexpr int kDepth = 4;             // steps of the ring
constexpr int kPitchUnit = 32 * 16;   // a row of the operand is padded to whole steps of any dtype
constexpr int kTilesWanted = 132 * 8; // a constant, so that the splits depend on the shape alone

// Floats of a row in scratch memory and of the stream: whole quads, 16 bytes, so that one access reads four. What pads a row in
// scratch memory may be anything.
template <class I> __host__ __device__ I padded_row(I count) { return (count + 3) / 4 * 4; }

// The parameter of the kernel. Addresses below are in `scratch`.
struct DecodeArguments {
  DecodePlan plan;  // plan.layer is on the device
  DecodeCall call;  // its caches are in `address`, first the decoder's, then the encoder's
  unsigned* barrier;
  float *query, *part, *part_state, *branch, *active, *top;
  int* winner;
  int pitch;                    // floats between the operand's rows
  int chunks, cross_chunks;     // the most chunks of keys, see decode_attention.cuh
  int by_columns;               // 1: a layer has a matrix of that kind
  int wide_weights, wide_keys;  // 1: 16-byte accesses are aligned and end with a row
  std::uintptr_t address[kMostAddresses];
};
static_assert(sizeof(DecodeArguments) <= 4096, "what a launch takes");

enum class Phase { kQueryKeyValue, kOutput, kCrossQuery, kCrossOutput, kUp, kDown, kLogits };  // the products

namespace {

// A logit and its token. NaN counts as the largest; the first of equals wins.
struct Top {
  float value;
  int token;
};
__device__ Top better(Top a, Top b) {
  if (a.value != a.value) return a;
  if (b.value != b.value || b.value > a.value || (b.value == a.value && b.token < a.token)) return b;
  return a;
}

__device__ inline float widen(int8_t v) {  // exact; the conversion instruction runs at a quarter of the rate on some chips
  return __uint_as_float(0x4b000000u | (uint8_t)(v ^ 0x80)) - 8388736.0f;
}
using pyfused::widen;

// a / b for 0 <= a < 2^21 and b > 0, in six instructions in place of twenty. Exact: (a + 0.5) / b is 0.5 / b or more away from an
// integer, and the error is below (a + 0.5) / b / 2^22.
__device__ inline int quotient(int a, int b) { return (int)__fdividef(a + 0.5f, (float)b); }

// Where does x's element p lie in the operand, if the product reads 2^bits elements of a row with one access? Four neighbours
// stay together, and the lanes' fours lie side by side, so that a warp reads 512 bytes without a bank conflict.
__device__ int operand_place(int p, int bits) {
  const int within = p & ((1 << bits) - 1), lane = p >> bits & (kWarp - 1);
  return (p >> (bits + 5) << (bits + 5)) + (within >> 2 << 7) + (lane << 2) + (p & 3);
}

// What a block has in shared memory, and who the thread is.
template <class T, int ROWS> struct DecodeBlock {
  const DecodeArguments& a;
  GridBarrier barrier;
  const int m, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  unsigned char* ring;   // [kDepth][4][thread] of 16 bytes
  DecodeLayer* layers;   // this layer and the next, by turns
  DecodeMatrix* head;
  float* sums;           // [2][warp][row][column]; a tile by columns is 16 bytes' elements times as wide
  int* places;           // (8), of the rows in the cache
  float* stream;         // (m, padded_row(hidden)), the residual stream: every block keeps all of it. What pads a row is 0
  float* operand;        // (m, pitch), or attention's queries and states

  __device__ DecodeBlock(const DecodeArguments& arguments, unsigned char* shared)
      : a(arguments), barrier{arguments.barrier}, m((int)arguments.call.rows) {
    ring = shared;
    layers = (DecodeLayer*)(ring + kDepth * kColumns * 16 * blockDim.x);
    head = (DecodeMatrix*)(layers + 2);
    places = (int*)(head + 2);  // two, to keep 16 bytes' alignment
    sums = (float*)(places + kMostRows);
    stream = sums + 2 * warps * ROWS * kColumns * (a.by_columns ? 16 / sizeof(T) : 1);
    operand = stream + m * padded_row((int)a.plan.hidden);
  }
};

// Bytes of all that; `columns` of a tile. Host code.
inline size_t block_bytes(int threads, int rows_kept, int columns, int64_t rows, int64_t hidden, int64_t operand_floats) {
  const int64_t sums = 2 * threads / kWarp * rows_kept * columns, stream = rows * padded_row(hidden);
  return kDepth * kColumns * 16 * threads + 2 * sizeof(DecodeLayer) + 2 * sizeof(DecodeMatrix) +
         4 * (kMostRows + sums + stream + operand_floats);
}

template <class T, int ROWS> struct DecodeProduct : DecodeBlock<T, ROWS> {
  using Base = DecodeBlock<T, ROWS>;
  using Base::a, Base::m, Base::warp, Base::lane, Base::warps, Base::ring, Base::layers, Base::head, Base::sums, Base::operand;
  static constexpr int kSums = ROWS * kColumns;

  // The product that the ring has the first steps of.
  Phase phase;
  const DecodeMatrix* matrices;        // in shared memory: one, query and its neighbours key and value, or gate and inner
  bool int8, gated;
  int first, last, width;              // the block's features, and how many a tile has: gated, 2 of gate and 2 of inner
  int splits, groups, group, rounds;   // `groups` tiles at once; this warp belongs to tile round * groups + group
  int first_warp;                      // of those that share its tile
  int begin, end, k;                   // this warp's steps of a tile
  int ahead_round, ahead_step, filled; // the next step to request, and its slot
  std::uintptr_t from[kColumns];       // the rows of W of its tile

  __device__ explicit DecodeProduct(const DecodeArguments& arguments, unsigned char* shared) : Base(arguments, shared) {}

  // A lane reads 2^bits elements of a row of W at once. k elements fill whole steps of a warp.
  __device__ static int vector_bits(bool is_int8) { return is_int8 ? 4 : sizeof(T) == 2 ? 3 : 2; }
  __device__ static int steps_of(int k, int bits) { return ((k - 1) >> (bits + 5)) + 1; }

  // The matrix that a feature belongs to, and its row there. `second`: inner's row for a gated feature.
  __device__ const DecodeMatrix& matrix_of(int feature, bool second, int& row) const {
    row = feature;
    if (phase != Phase::kQueryKeyValue) return matrices[gated && second];
    const int queries = (int)matrices[0].n, keys = (int)matrices[1].n;
    if (feature < queries) return matrices[0];
    row = feature - queries;
    if (row < keys) return matrices[1];
    row -= keys;
    return matrices[2];
  }

  // The feature of a tile's column; at least `last` if there is none.
  __device__ int feature_of(int round, int column) const {
    return first + (round * groups + group) * width + (gated ? column % 2 : column);
  }

  __device__ void set(Phase which, const DecodeLayer& layer) {
    phase = which, gated = which == Phase::kUp && layer.gate.n;
    switch (phase) {
      case Phase::kQueryKeyValue: matrices = &layer.query; return;
      case Phase::kOutput: matrices = &layer.output; return;
      case Phase::kCrossQuery: matrices = &layer.cross_query; return;
      case Phase::kCrossOutput: matrices = &layer.cross_output; return;
      case Phase::kUp: matrices = gated ? &layer.gate : &layer.inner; return;
      case Phase::kDown: matrices = &layer.outer; return;
      default: matrices = head;
    }
  }
  __device__ int feature_count() const {
    return (int)(matrices[0].n + (phase == Phase::kQueryKeyValue ? matrices[1].n + matrices[2].n : 0));
  }

  // The block's share of `count` features or items.
  __device__ void find_share(int count) {
    const int each = (int)((unsigned)count / gridDim.x), rest = count - each * (int)gridDim.x, block = (int)blockIdx.x;
    first = each * block + min(block, rest), last = first + each + (block < rest);
  }

  // Divides the phase's product among blocks and warps, and requests the first steps. The last product's are consumed.
  __device__ void request() {
    const int n = feature_count();
    int8 = matrices->scale, k = (int)matrices->k, width = gated ? kColumns / 2 : kColumns;
    find_share(n);
    ahead_round = 0, ahead_step = begin = end = rounds = filled = 0;
    if (n == 0) return;  // a plan without a head
    const int steps = steps_of(k, vector_bits(int8));
    splits = max(1, min(quotient(kTilesWanted * width, n), min(steps, warps)));
    const int share = quotient(steps - 1, splits) + 1;
    splits = quotient(steps - 1, share) + 1, groups = quotient(warps, splits), group = quotient(warp, splits);
    const int tiles = quotient(last - first + width - 1, width);
    rounds = quotient(tiles + groups - 1, groups), first_warp = group * splits;
    begin = (warp - first_warp) * share, end = min(begin + share, steps);
    if (group >= groups) end = begin;  // a warp left over
    ahead_step = begin;
    find_rows();
#pragma unroll 1
    for (int i = 0; i < kDepth; ++i) int8 ? request_step<int8_t>() : request_step<T>();
    if (lane < kColumns)
      if (const int feature = feature_of(0, lane); feature < last) {
        int row;
        if (const DecodeMatrix& of_bias = matrix_of(feature, lane >= 2, row); of_bias.bias)
          prefetch_l2((const T*)of_bias.bias + row);
      }
  }

  __device__ unsigned char* slot(int step, int column) const {
    return ring + ((step * kColumns + column) * (int)blockDim.x + (int)threadIdx.x) * 16;
  }

  // Finds the rows of W of a tile, for the requests; null past the last feature. Lane c looks column c up.
  __device__ void find_rows() {
    const int column = lane % kColumns, feature = feature_of(ahead_round, column);
    std::uintptr_t found = 0;
    if (ahead_round < rounds && group < groups && feature < last) {
      int row;
      const DecodeMatrix& matrix = matrix_of(feature, column >= 2, row);
      found = matrix.weight + row * matrix.stride * (int8 ? 1 : sizeof(T));
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) from[c] = __shfl_sync(kAllLanes, found, c);
  }

  template <class W> __device__ void request_step() {
    constexpr int V = 16 / sizeof(W);
    if (from[0] && ahead_step < end) {
      const int at = (ahead_step * kWarp + lane) * V;
      if (a.wide_weights) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const bool inside = from[c] && at < k;
          cp_async16(slot(filled, c), inside ? (const W*)from[c] + at : (const W*)a.branch, inside);
        }
      } else {  // not aligned
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll 1
          for (int j = 0; j < V; ++j) ((W*)slot(filled, c))[j] = from[c] && at + j < k ? ((const W*)from[c])[at + j] : W{};
      }
      if (++ahead_step == end) {
        ahead_step = begin, ++ahead_round;
        find_rows();
      }
    }
    cp_async_commit();
    filled = filled + 1 == kDepth ? 0 : filled + 1;
  }

  // Calls put(row, feature, value, up) for every sum of the block: value = x W^T + bias, and up the same of inner if gated.
  template <class Put> __device__ void multiply(const Put& put) { int8 ? multiply_as<int8_t>(put) : multiply_as<T>(put); }

  template <class W, class Put> __device__ void multiply_as(const Put& put) {
    constexpr int V = 16 / sizeof(W);
    int used = 0;
    for (int round = 0; round < rounds; ++round) {
      // Lane i writes sum i. Its bias and scale arrive meanwhile.
      const int column = lane % kColumns, feature = feature_of(round, column);
      const bool writes = lane < kSums && lane / kColumns < m && warp == first_warp && group < groups && feature < last &&
                          column < width;
      Terms of_value, of_up;
      if (writes) {
        of_value = terms(feature, false);
        if (gated) of_up = terms(feature, true);
      }
      float sum[kSums] = {};
      if (feature_of(round, 0) < last)
        for (int step = begin; step < end; ++step) {
          Pack<W, V> w[kColumns];
          cp_async_wait<kDepth - 1>();
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            w[c] = load<V>((const W*)slot(used, c));
          request_step<W>();
          used = used + 1 == kDepth ? 0 : used + 1;
          const float* x = operand + step * kWarp * V + lane * 4;
#pragma unroll
          for (int quad = 0; quad < V / 4; ++quad) {
            const float* row = x + quad * kWarp * 4;
            if (ROWS == 8 && quad > 0) __syncwarp();  // otherwise the reads of all quads come first, and registers spill
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
              const Pack<float, 4> four = load<4>(row);
              if (r + 1 < m) row += a.pitch;  // rows past the last repeat it and are dropped
#pragma unroll
              for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int c = 0; c < kColumns; ++c) sum[r * kColumns + c] += widen(w[c].at[quad * 4 + j]) * four.at[j];
            }
          }
        }
      float* mine = sums + ((round % 2) * warps + warp) * kSums;
      const float total = spread_sum<kSums>(sum);
      if (lane % (kWarp / kSums) == 0) mine[lane / (kWarp / kSums)] = total;
      splits > 1 ? __syncthreads() : __syncwarp();
      if (writes) {
        float value = 0, up = 0;
        for (int part = 0; part < splits; ++part) {
          value += mine[part * kSums + lane];
          if (gated) up += mine[part * kSums + lane + width];
        }
        put(lane / kColumns, feature, of_value.of(value), of_up.of(up));
      }
    }
    cp_async_commit();  // a layer's struct, see fetch_layer()
    cp_async_wait<0>();
  }

  // What makes a result of a sum. The bias is widened where it is used: a conversion would wait for the L2 before the product.
  struct Terms {
    float scale = 1;
    T bias = narrow<T>(0.0f);
    __device__ float of(float sum) const { return sum * scale + widen(bias); }
  };
  __device__ Terms terms(int feature, bool second) const {
    int row;
    const DecodeMatrix& matrix = matrix_of(feature, second, row);
    Terms found;
    if (matrix.scale) found.scale = __ldcg((const float*)matrix.scale + row);
    if (matrix.bias) found.bias = __ldcg((const T*)matrix.bias + row);
    return found;
  }
};

}  // namespace
}  // namespace pyfused
