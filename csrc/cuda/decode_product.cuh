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
constexpr int kDepth = 4;             // steps of the ring
constexpr int kPitchUnit = 32 * 16;   // a row of the operand is padded to whole steps of any dtype
constexpr int kTilesWanted = 132 * 8; // a constant, so that the splits depend on the shape alone

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

enum class Phase { kQueryKeyValue, kAttend, kOutput, kCrossQuery, kCrossAttend, kCrossOutput, kUp, kDown, kLogits };

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

// Where does x's element p lie in the operand, if the product reads 2^bits elements of a row with one access? Four neighbours
// stay together, and the lanes' fours lie side by side, so that a warp reads 512 bytes without a bank conflict.
__device__ int operand_place(int p, int bits) {
  const int within = p & ((1 << bits) - 1), lane = p >> bits & (kWarp - 1);
  return (p >> (bits + 5) << (bits + 5)) + (within >> 2 << 7) + (lane << 2) + (p & 3);
}

// What a block has in shared memory, and who the thread is.
template <class T, int ROWS> struct DecodeBlock {
  const DecodeArguments& a;
  const int m, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  unsigned char* ring;   // [kDepth][4][thread] of 16 bytes
  DecodeLayer* layers;   // this layer and the next, by turns
  DecodeMatrix* head;
  float* sums;           // [2][warp][row][column]; a tile by columns is 16 bytes' elements times as wide
  float* stream;         // (m, hidden), the residual stream: every block keeps all of it
  float* operand;        // (m, pitch), or attention's queries and states

  __device__ DecodeBlock(const DecodeArguments& arguments, unsigned char* shared)
      : a(arguments), m((int)arguments.call.rows) {
    ring = shared;
    layers = (DecodeLayer*)(ring + kDepth * kColumns * 16 * blockDim.x);
    head = (DecodeMatrix*)(layers + 2);
    sums = (float*)(head + 2);  // two, to keep 16 bytes' alignment
    stream = sums + 2 * warps * ROWS * kColumns * (a.by_columns ? 16 / sizeof(T) : 1);
    operand = stream + (m * (int)a.plan.hidden + 3) / 4 * 4;
  }
};

// Bytes of all that; `columns` of a tile. Host code.
inline size_t block_bytes(int threads, int rows_kept, int columns, int64_t rows, int64_t hidden, int64_t operand_floats) {
  const int64_t sums = 2 * threads / kWarp * rows_kept * columns, stream = (rows * hidden + 3) / 4 * 4;
  return kDepth * kColumns * 16 * threads + 2 * sizeof(DecodeLayer) + 2 * sizeof(DecodeMatrix) +
         4 * (sums + stream + operand_floats);
}

template <class T, int ROWS> struct DecodeProduct : DecodeBlock<T, ROWS> {
  using Base = DecodeBlock<T, ROWS>;
  using Base::a, Base::m, Base::warp, Base::lane, Base::warps, Base::ring, Base::layers, Base::head, Base::sums, Base::operand;
  static constexpr int kSums = ROWS * kColumns;

  // The product that the ring has the first steps of.
  Phase phase;
  const DecodeLayer* layer;
  bool int8, gated;
  int first, last, width;              // the block's features, and how many a tile has: gated, 2 of gate and 2 of inner
  int splits, groups, group, rounds;   // `groups` tiles at once; this warp belongs to tile round * groups + group
  int begin, end, k;                   // this warp's steps of a tile
  int ahead_round, ahead_step, filled; // the next step to request, and its slot
  const void* from[kColumns];          // the rows of W of its tile

  __device__ explicit DecodeProduct(const DecodeArguments& arguments, unsigned char* shared) : Base(arguments, shared) {}

  // A lane reads 2^bits elements of a row of W at once. k elements fill whole steps of a warp.
  __device__ static int vector_bits(bool is_int8) { return is_int8 ? 4 : sizeof(T) == 2 ? 3 : 2; }
  __device__ static int steps_of(int k, int bits) { return ((k - 1) >> (bits + 5)) + 1; }

  // The matrix that a feature belongs to, and its row there. `second`: inner's row for a gated feature.
  __device__ const DecodeMatrix& matrix_of(int feature, bool second, int& row) const {
    row = feature;
    switch (phase) {
      case Phase::kQueryKeyValue: {
        const int queries = (int)layer->query.n, keys = (int)layer->key.n;
        if (feature < queries) return layer->query;
        row = feature - queries;
        if (row < keys) return layer->key;
        row -= keys;
        return layer->value;
      }
      case Phase::kOutput: return layer->output;
      case Phase::kCrossQuery: return layer->cross_query;
      case Phase::kCrossOutput: return layer->cross_output;
      case Phase::kUp: return gated && !second ? layer->gate : layer->inner;
      case Phase::kDown: return layer->outer;
      default: return *head;
    }
  }

  // The feature of a tile's column; at least `last` if there is none.
  __device__ int feature_of(int round, int column) const {
    return first + (round * groups + group) * width + (gated ? column % 2 : column);
  }

  __device__ void set(Phase which, const DecodeLayer* of) {
    phase = which, layer = of;
    gated = which == Phase::kUp && layer->gate.n;
  }
  __device__ int features_of(const DecodeMatrix& first_of_phase) const {
    return (int)(first_of_phase.n + (phase == Phase::kQueryKeyValue ? layer->key.n + layer->value.n : 0));
  }

  // Divides a phase's product among blocks and warps, and requests the first steps. The last product's are consumed.
  __device__ void request(Phase which, const DecodeLayer* of) {
    set(which, of);
    int row;
    const DecodeMatrix& matrix = matrix_of(0, false, row);
    const int n = features_of(matrix);
    int8 = matrix.scale, k = (int)matrix.k, width = gated ? kColumns / 2 : kColumns;
    first = (int)((int64_t)n * blockIdx.x / gridDim.x), last = (int)((int64_t)n * (blockIdx.x + 1) / gridDim.x);
    ahead_round = 0, ahead_step = begin = end = rounds = filled = 0;
    if (n == 0) return;  // a plan without a head
    const int steps = steps_of(k, vector_bits(int8));
    splits = max(1, min(kTilesWanted * width / n, min(steps, warps)));
    const int share = (steps - 1) / splits + 1;
    splits = (steps - 1) / share + 1, groups = warps / splits, group = warp / splits;
    const int tiles = (last - first + width - 1) / width;
    rounds = (tiles + groups - 1) / groups;
    begin = warp % splits * share, end = min(begin + share, steps);
    if (group >= groups) end = begin;  // a warp left over
    ahead_step = begin;
    find_rows();
    for (int i = 0; i < kDepth; ++i) int8 ? request_step<int8_t>() : request_step<T>();
    if (lane < kColumns)
      if (const int feature = feature_of(0, lane); feature < last)
        if (const DecodeMatrix& of_bias = matrix_of(feature, lane >= 2, row); of_bias.bias)
          prefetch_l2((const T*)of_bias.bias + row);
  }

  __device__ unsigned char* slot(int step, int column) const {
    return ring + ((step * kColumns + column) * (int)blockDim.x + (int)threadIdx.x) * 16;
  }

  template <class W> __device__ const W* weight_of(int round, int column) const {
    int row;
    const DecodeMatrix& matrix = matrix_of(feature_of(round, column), column >= 2, row);
    return (const W*)matrix.weight + row * matrix.stride;
  }

  // Finds the rows of W of a tile, for the requests; null past the last feature.
  __device__ void find_rows() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const bool inside = ahead_round < rounds && group < groups && feature_of(ahead_round, c) < last;
      from[c] = !inside ? nullptr : int8 ? (const void*)weight_of<int8_t>(ahead_round, c) : weight_of<T>(ahead_round, c);
    }
  }

  template <class W> __device__ void request_step() {
    constexpr int V = 16 / sizeof(W);
    if (a.wide_weights && from[0] && ahead_step < end) {
      const int at = (ahead_step * kWarp + lane) * V;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const bool inside = from[c] && at < k;
        cp_async16(slot(filled, c), inside ? (const W*)from[c] + at : (const W*)a.branch, inside);
      }
      if (++ahead_step == end) {
        ahead_step = begin, ++ahead_round;
        find_rows();
      }
    }
    cp_async_commit();
    filled = filled + 1 == kDepth ? 0 : filled + 1;
  }

  // 16 bytes of a row of W, where they are not aligned.
  template <class W, int V> __device__ Pack<W, V> gather(int round, int column, int at) const {
    Pack<W, V> out;
    const bool inside = feature_of(round, column) < last;
    const W* from = inside ? weight_of<W>(round, column) : nullptr;
#pragma unroll
    for (int j = 0; j < V; ++j) out.at[j] = inside && at + j < k ? from[at + j] : W{};
    return out;
  }

  // Calls put(row, feature, value, up) for every sum of the block: value = x W^T + bias, and up the same of inner if gated.
  template <class Put> __device__ void multiply(const Put& put) { int8 ? multiply_as<int8_t>(put) : multiply_as<T>(put); }

  template <class W, class Put> __device__ void multiply_as(const Put& put) {
    constexpr int V = 16 / sizeof(W);
    int used = 0;
    for (int round = 0; round < rounds; ++round) {
      // Lane i writes sum i. Its bias and scale arrive meanwhile.
      const int column = lane % kColumns, feature = feature_of(round, column);
      const bool writes = lane < kSums && lane / kColumns < m && warp % splits == 0 && group < groups && feature < last &&
                          column < width;
      float scale = 1, bias = 0, up_scale = 1, up_bias = 0;
      if (writes) {
        terms(feature, false, scale, bias);
        if (gated) terms(feature, true, up_scale, up_bias);
      }
      float sum[kSums] = {};
      if (feature_of(round, 0) < last)
        for (int step = begin; step < end; ++step) {
          Pack<W, V> w[kColumns];
          cp_async_wait<kDepth - 1>();
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            w[c] = a.wide_weights ? load<V>((const W*)slot(used, c)) : gather<W, V>(round, c, (step * kWarp + lane) * V);
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
        put(lane / kColumns, feature, value * scale + bias, up * up_scale + up_bias);
      }
    }
    cp_async_commit();  // a layer's struct, see fetch_layer()
    cp_async_wait<0>();
  }

  __device__ void terms(int feature, bool second, float& scale, float& bias) const {
    int row;
    const DecodeMatrix& matrix = matrix_of(feature, second, row);
    if (matrix.scale) scale = ((const float*)matrix.scale)[row];
    if (matrix.bias) bias = widen(((const T*)matrix.bias)[row]);
  }
};

}  // namespace
}  // namespace pyfused
