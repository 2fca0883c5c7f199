// How does decode multiply its few rows by a weight matrix, all blocks together? y = x W^T, as parts of a persistent kernel.
//
// The operand x lies in every block's shared memory as float32. A block owns a stretch of features, four at a time for a warp
// (a tile); `splits` warps share a tile, each with a stretch of K, and one of them adds their sums in order. Splits depend on
// the shape alone, so the result does not depend on the number of blocks, to the last bit.
//
// A step of a warp is 16 bytes of each of four rows of W per lane: 2 KB. Each lane copies its own pieces into its own slots of
// a ring in shared memory (cp.async), kDepth steps ahead, and nobody else reads them: no barrier, no registers. The first
// kDepth steps are requested before the operand comes. With 256 threads that is 64 KB on each multiprocessor, all that a phase
// of GPT-2 124M reads there (9 to 36 KB). Then a request is short: it needs the rows' addresses alone, and nothing is requested
// during the product (Division::fits).
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
  float* result[6];                // of layer 0's products, by phase: (rows, padded_row(features)); a branch has parts of that
  float *part[2], *part_state[2];  // of layer 0's attention and cross-attention: values; maximum and sum, with a pitch of 4
  int64_t layer_bytes;             // from one layer's to the next's
  float* top;
  int* winner;
  int pitch;                    // floats between the operand's rows
  int chunks, cross_chunks;     // the most chunks of keys, see decode_attention.cuh
  int by_columns;               // 1: a layer has a matrix of that kind
  int wide_weights, wide_keys;  // 1: 16-byte accesses are aligned and end with a row
  std::uintptr_t address[kMostAddresses];
};
static_assert(sizeof(DecodeArguments) <= 4096, "what a launch takes");

enum class Phase { kQueryKeyValue, kOutput, kCrossQuery, kCrossOutput, kUp, kDown, kLogits };  // the products
constexpr int kPhases = 7;

// What is known of the weights when the kernel is compiled. kRows: the layers' matrices and the head are stored by rows, not as
// integers, and wide. kColumns: the layers' are stored by columns. With both, keys are wide too and have one query each. A kernel
// for anything has three times as many instructions in its loop, too many for the instruction cache.
enum class Form { kAny, kRows, kColumns };

// How a product is divided: this block's and this warp's part. It follows from n, k and the kind, so a warp finds it once for all
// layers, in several hundred instructions.
struct alignas(16) Division {
  int n, k, kind;                // features of all matrices, -1 if nothing has been divided yet; kind | gated << 8
  int first, last, width;        // the block's features, and how many a tile has: gated, 2 of gate and 2 of inner
  int splits, groups;            // warps that share a tile, and tiles at once
  int group, rounds;             // this warp belongs to tile round * groups + group
  int begin, end;                // this warp's steps of a tile
  int parts, steps, share;       // see decode_columns.cuh
  int fits;                      // 1: the ring takes all steps of the warp, and there is one round
};

// Where a column of a warp's first tile is: a row of one of the phase's matrices, or row -1 past the last feature.
struct alignas(8) Source {
  int row, matrix;
};

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
template <class T, int ROWS, Form FORM> struct DecodeBlock {
  static constexpr bool kPlain = FORM != Form::kAny;
  const DecodeArguments& a;
  GridBarrier barrier;
  const int m, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  unsigned char* ring;   // [kDepth][4][thread] of 16 bytes
  DecodeLayer* layers;   // this layer and the next, by turns
  DecodeMatrix* head;
  DecodeNorm* final_norm;
  float* sums;           // [2][warp][row][column]; a tile by columns is 16 bytes' elements times as wide
  int* places;           // (8), of the rows in the cache
  Division* divisions;   // [warp][phase]
  Source* sources;       // [warp][phase][column]
  float* stream;         // (m, padded_row(hidden)), the residual stream: every block keeps all of it. What pads a row is 0
  float* operand;        // (m, pitch), or attention's queries and states

  __device__ DecodeBlock(const DecodeArguments& arguments, unsigned char* shared)
      : a(arguments), barrier{arguments.barrier}, m((int)arguments.call.rows) {
    ring = shared;
    layers = (DecodeLayer*)(ring + kDepth * kColumns * 16 * blockDim.x);
    head = (DecodeMatrix*)(layers + 2);
    final_norm = (DecodeNorm*)(head + 1);
    places = (int*)(head + 2);  // behind the norm, at a multiple of 16 bytes
    divisions = (Division*)(places + kMostRows);
    sources = (Source*)(divisions + warps * kPhases);
    sums = (float*)(sources + warps * kPhases * kColumns);
    stream = sums + 2 * warps * ROWS * kColumns * (a.by_columns ? 16 / sizeof(T) : 1);
    operand = stream + m * padded_row((int)a.plan.hidden);
  }
};

// Bytes of all that; `columns` of a tile. Host code.
inline size_t block_bytes(int threads, int rows_kept, int columns, int64_t rows, int64_t hidden, int64_t operand_floats) {
  const int64_t sums = 2 * threads / kWarp * rows_kept * columns, stream = rows * padded_row(hidden);
  return kDepth * kColumns * 16 * threads + 2 * sizeof(DecodeLayer) + 2 * sizeof(DecodeMatrix) +
         threads / kWarp * kPhases * (sizeof(Division) + kColumns * sizeof(Source)) +
         4 * (kMostRows + sums + stream + operand_floats);
}

template <class T, int ROWS, Form FORM> struct DecodeProduct : DecodeBlock<T, ROWS, FORM>, Division {
  using Base = DecodeBlock<T, ROWS, FORM>;
  using Base::a, Base::m, Base::warp, Base::lane, Base::warps, Base::ring, Base::layers, Base::head, Base::sums, Base::operand;
  static constexpr int kSums = ROWS * kColumns;

  // The product that the ring has the first steps of.
  Phase phase;
  const DecodeMatrix* matrices;  // in shared memory: one, query and its neighbours key and value, or gate and inner
  bool int8, gated;

  // The next step to request, its slot, and the rows of W of its tile.
  struct Ahead {
    int round, step, filled;
    std::uintptr_t from[kColumns];
  };

  __device__ explicit DecodeProduct(const DecodeArguments& arguments, unsigned char* shared) : Base(arguments, shared) {
    if (lane < kPhases) this->divisions[warp * kPhases + lane].n = -1;
    __syncwarp();
  }

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

  // Divides the phase's product, as `divide` does, unless the last layer's was the same.
  template <class Divide> __device__ void divide_once(const Divide& divide) {
    Division &own = *this, &kept = this->divisions[warp * kPhases + (int)phase];
    const int features = feature_count(), terms = (int)matrices->k, of_kind = (int)matrices->kind | gated << 8;
    if (kept.n == features && kept.k == terms && kept.kind == of_kind) {
      own = kept;
      return;
    }
    n = features, k = terms, kind = of_kind;
    divide();
    __syncwarp();
    if (lane == 0) kept = own;
    __syncwarp();
  }

  __device__ bool is_wide() const { return Base::kPlain || a.wide_weights; }

  __device__ Source& source() const { return this->sources[(warp * kPhases + (int)phase) * kColumns + lane % kColumns]; }

  // Requests the first steps of the phase's product. The last product's are consumed.
  __device__ void request() {
    int8 = !Base::kPlain && matrices->scale;
    divide_once([&] { divide(); });
    if (fits && is_wide()) {
      const Source source = this->source();
      const DecodeMatrix& matrix = matrices[source.matrix];
      const int size = int8 ? 1 : sizeof(T);
      const std::uintptr_t found = source.row < 0 ? 0 : matrix.weight + source.row * matrix.stride * size;
      const char* rows[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) rows[c] = (const char*)__shfl_sync(kAllLanes, found, c);
      int at = (begin * kWarp + lane) * 16;
#pragma unroll 1
      for (int i = 0; i < end - begin; ++i, at += kWarp * 16)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const bool inside = rows[c] && at < k * size;
          cp_async16(slot(i, c), inside ? rows[c] + at : (const char*)a.result[0], inside);
        }
      cp_async_commit();
    } else {
      Ahead ahead = ahead_from(0);
#pragma unroll 1
      for (int i = 0; i < kDepth; ++i) int8 ? request_step<int8_t>(ahead) : request_step<T>(ahead);
    }
    // The last warp often has no tile. Two lines at most have the block's biases.
    if (warp == warps - 1 && lane < 2 && first < last) {
      int row;
      if (const DecodeMatrix& of_bias = matrix_of(lane ? last - 1 : first, false, row); of_bias.bias)
        prefetch_l2((const T*)of_bias.bias + row);
    }
  }

  __device__ void divide() {
    width = gated ? kColumns / 2 : kColumns;
    find_share(n);
    splits = groups = 1, group = begin = end = rounds = fits = 0;
    if (n == 0) return;  // a plan without a head
    const int steps = steps_of(k, vector_bits(int8));
    splits = max(1, min(quotient(kTilesWanted * width, n), min(steps, warps)));
    const int share = quotient(steps - 1, splits) + 1;
    splits = quotient(steps - 1, share) + 1, groups = quotient(warps, splits), group = quotient(warp, splits);
    const int tiles = quotient(last - first + width - 1, width);
    rounds = quotient(tiles + groups - 1, groups);
    begin = (warp - group * splits) * share, end = min(begin + share, steps);
    if (group >= groups) end = begin;  // a warp left over
    fits = rounds <= 1 && end - begin <= kDepth;
    if (lane < kColumns) {
      Source source{-1, 0};
      if (const int feature = feature_of(0, lane); group < groups && feature < last) {
        int row;
        const DecodeMatrix& matrix = matrix_of(feature, lane >= 2, row);
        source = {row, (int)(&matrix - matrices)};
      }
      this->source() = source;
    }
  }

  __device__ unsigned char* slot(int step, int column) const {
    return ring + ((step * kColumns + column) * (int)blockDim.x + (int)threadIdx.x) * 16;
  }

  // What is to be requested behind the first `done` steps, whole rings.
  __device__ Ahead ahead_from(int done) const {
    const int each = max(1, end - begin), round = quotient(done, each);
    Ahead ahead{round, begin + done - round * each, 0, {}};
    find_rows(ahead);
    return ahead;
  }

  // Finds the rows of W of a tile; null past the last feature. Lane c looks column c up.
  __device__ void find_rows(Ahead& ahead) const {
    const int column = lane % kColumns, feature = feature_of(ahead.round, column);
    std::uintptr_t found = 0;
    if (ahead.round < rounds && group < groups && feature < last) {
      int row;
      const DecodeMatrix& matrix = matrix_of(feature, column >= 2, row);
      found = matrix.weight + row * matrix.stride * (int8 ? 1 : sizeof(T));
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) ahead.from[c] = __shfl_sync(kAllLanes, found, c);
  }

  template <class W> __device__ void request_step(Ahead& ahead) const {
    constexpr int V = 16 / sizeof(W);
    if (ahead.from[0] && ahead.step < end) {
      const int at = (ahead.step * kWarp + lane) * V;
      if (is_wide()) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const bool inside = ahead.from[c] && at < k;
          cp_async16(slot(ahead.filled, c), inside ? (const W*)ahead.from[c] + at : (const W*)a.result[0], inside);
        }
      } else {  // not aligned
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll 1
          for (int j = 0; j < V; ++j)
            ((W*)slot(ahead.filled, c))[j] = ahead.from[c] && at + j < k ? ((const W*)ahead.from[c])[at + j] : W{};
      }
      if (++ahead.step == end) {
        ahead.step = begin;
        if (++ahead.round < rounds) find_rows(ahead);
        else ahead.from[0] = 0;
      }
    }
    cp_async_commit();
    ahead.filled = ahead.filled + 1 == kDepth ? 0 : ahead.filled + 1;
  }

  // Calls put(row, feature, value, up) for every sum of the block: value = x W^T + bias, and up the same of inner if gated.
  template <class Put> __device__ void multiply(const Put& put) { int8 ? multiply_as<int8_t>(put) : multiply_as<T>(put); }

  template <class W, class Put> __device__ void multiply_as(const Put& put) {
    constexpr int V = 16 / sizeof(W);
    const bool is_there = fits && is_wide();  // all that the warp needs, after this
    int used = 0;
    Ahead ahead;
    if (is_there) cp_async_wait<0>();
    else ahead = ahead_from(kDepth);
    for (int round = 0; round < rounds; ++round) {
      // Lane i writes sum i. Its bias and scale arrive meanwhile.
      const int column = lane % kColumns, feature = feature_of(round, column);
      const bool writes = lane < kSums && lane / kColumns < m && warp == group * splits && group < groups && feature < last &&
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
          if (!is_there) cp_async_wait<kDepth - 1>();
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            w[c] = load<V>((const W*)slot(used, c));
          if (!is_there) request_step<W>(ahead);
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
#pragma unroll 2
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
