// decode on CUDA: one token per row through a whole decoder, at most 8 rows, in one persistent kernel.
//
// One block of 256 threads on each multiprocessor takes part in every phase. A barrier for the grid ends a phase and has its
// name. Per layer:
//   "query, key and value"   norm, one product; keys and values go into the cache
//   "attention"              chunks of keys (decode_attention.cuh)
//   "output"                 adds the chunks, one product
//   "cross query", "cross attention", "cross output"   the same, if there is an encoder
//   "up"                     norm, product with gate and inner, activation
//   "down"                   one product
// then "logits", and a token is chosen (decode_choice.cuh). Every block keeps the residual stream in its shared memory and
// computes the norms for itself: it reads 3 KB a row from the L2, which takes less time than a barrier (decode_operand.cuh).
// Activations are float32 from the embedding to the logits; caches and logits have the weights' dtype. The next product's weights
// are on their way while a block waits (decode_product.cuh; decode_columns.cuh for weights stored transposed). No atomics on
// floats: the result is the same to the last bit, with any number of blocks.
//
// An H200 ran it in bfloat16 with 129 keys, as a CUDA graph, with 1, 4 and 8 rows. What it showed has been mended since. Then
// GPT-2 took 318 us with one row, and a token of the Generator 335 with one row and 427 with four. Floors: the weights' bytes at
// 3.0 TB/s.
//                                                       floor   measured before        predicted now
//   GPT-2 124M, 249 MB, 60 barriers                       83 us   548, 972, 1066 us      260, 300, 350 us
//   GPT-2 124M by columns, no head, 170 MB, 60 barriers   57 us   487, 955, 1078 us      245, 315, 365 us
//   T5 1.1 base's decoder, 248 MB, 96 barriers            83 us   776, 1494, 1506 us     390, 450, 500 us
// A phase has little to compute, so what counts is how often it waits for the L2, one wait behind the other. In a layer of GPT-2:
//                                                         measured before    now, 1, 4 and 8 rows
//   query, key and value: the branch; the norm's weights    4, 15, 30          1, 1, 1
//   attention: places and queries, then keys and values     6, 8, 12           1.5, 2, 3
//   output: the chunks of keys                             18, 48, 24          1, 1, 2
//   up: as the first                                        4, 15, 30          1, 1, 1
//   down: the operand                                       3, 12, 24          1, 3, 3
// Together 35, 98 and 120 before. The measured times of 4 and 8 rows, 424 and 518 us above that of one, make it 0.5 us a wait, 210
// us of the 548. The other 5 us a phase were the barrier, whose fence came behind the requests for the next weights and may have
// waited for them, some 1,100 instructions before it that divide the next product (two 64-bit divisions), and the product.
// Now: 5.5 waits, 2.7 us. Five barriers of 2 us, with the division's 450 instructions in their shadow: 10 us. Four products with
// their sums, 1.2 us each: 5 us. Statistics of two norms and the sums of attention's warps: 1.4 us. A layer takes 19 us, the head
// 26.
//
// Choosing a token adds a barrier. A draw from 50,257 logits in bfloat16 adds a pass of one block over them and searches. By
// index 7 and 2 us; by score 12 us, for the sums of 64 bits are compare-and-swap loops, and 7 us for each search (4 to list a
// bucket, 3 for the bits). So 9 us with a temperature alone, 26 with top p. As operators it is 15 to 20 launches, one of them a
// sort. So barriers, not bytes, set the pace of small models, and int8 shortens only the head there. Of GPT-2 XL's 3.1 GB
// (1,040 us, 240 barriers) about 60% hide behind barriers.
#include "kernels.h"

#include "decode_operand.cuh"

namespace pyfused::cuda {
namespace {

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <class T, int ROWS> struct Decode : DecodeOperand<T, ROWS> {
  using Base = DecodeOperand<T, ROWS>;
  using Base::a, Base::m, Base::layers, Base::operand, Base::top, Base::hidden, Base::inner, Base::stream_pitch,
      Base::branch_parts, Base::embed, Base::prepare, Base::norm_of;

  __device__ Decode(const DecodeArguments& arguments, unsigned char* shared) : Base(arguments, shared) {}

  __device__ void run() {
    const int count = (int)a.plan.layers;
    fetch_layer(0);
    cp_async_commit();
    if (threadIdx.x == 0) *this->head = a.plan.head;
    cp_async_wait<0>();
    __syncthreads();
    const bool has_cross = count && layers[0].cross_query.n;
    Phase phase = count ? Phase::kQueryKeyValue : Phase::kLogits;
    const char* ended = nullptr;
    for (int i = 0;;) {
      const DecodeLayer& layer = layers[i % 2];
      announce(phase, layer, i);
      ended ? this->barrier.wait(ended) : embed();
      if (phase == Phase::kOutput || phase == Phase::kCrossOutput) {
        const bool cross = phase == Phase::kCrossOutput;
        this->attend(i, cross, cross ? layer.cross_scale : layer.scale);
        this->barrier.arrive();
        this->barrier.wait(cross ? "cross attention" : "attention");
      }
      if (phase == Phase::kQueryKeyValue) fetch_layer(i + 1);  // the place of the last layer, which no thread reads now
      prepare(phase, layer, i);
      __syncthreads();
      if (phase == Phase::kLogits && !a.plan.head.n) return put_hidden();
      this->multiply([&](int part, int row, int feature, float value, float up) {
        put(phase, i, part, row, feature, value, up);
      });
      if (phase == Phase::kLogits) break;
      this->barrier.arrive();
      if (!norm_of(phase, layer)) branch_parts = this->parts;
      ended = name_of(phase);
      if (phase == Phase::kDown) ++i;
      phase = next_product(phase, has_cross, i == count);
    }
    if (a.call.chosen) this->choose();
  }

  // A barrier has the name of the phase that it ends, a product or attention.
  __device__ static const char* name_of(Phase phase) {
    switch (phase) {
      case Phase::kQueryKeyValue: return "query, key and value";
      case Phase::kOutput: return "output";
      case Phase::kCrossQuery: return "cross query";
      case Phase::kCrossOutput: return "cross output";
      case Phase::kUp: return "up";
      case Phase::kDown: return "down";
      default: return "logits";
    }
  }

  __device__ static Phase next_product(Phase phase, bool has_cross, bool is_last) {
    switch (phase) {
      case Phase::kQueryKeyValue: return Phase::kOutput;
      case Phase::kOutput: return has_cross ? Phase::kCrossQuery : Phase::kUp;
      case Phase::kCrossQuery: return Phase::kCrossOutput;
      case Phase::kCrossOutput: return Phase::kUp;
      case Phase::kUp: return Phase::kDown;
      default: return is_last ? Phase::kLogits : Phase::kQueryKeyValue;
    }
  }

  // ---- operands -----------------------------------------------------------------------------------------------------

  // Starts copying layer i's struct into shared memory. The end of the next product waits for it.
  __device__ void fetch_layer(int i) {
    static_assert(sizeof(DecodeLayer) % 16 == 0, "copied in pieces of 16 bytes");
    if (i >= a.plan.layers) return;
    const char* source = (const char*)((const DecodeLayer*)a.plan.layer + i);
    for (int at = threadIdx.x * 16; at < (int)sizeof(DecodeLayer); at += blockDim.x * 16)
      cp_async16((char*)(layers + i % 2) + at, source + at, true);
  }

  // Has sent, while the block waits for the operand: the weights of a product and of its norm, and the keys and values that the
  // block attends to before.
  __device__ void announce(Phase phase, const DecodeLayer& layer, int i) {
    this->request(phase, layer);
    constexpr int LINE = 128 / sizeof(T);
    if (const DecodeNorm* norm = norm_of(phase, layer))
      for (int c = threadIdx.x * LINE; c < hidden; c += blockDim.x * LINE) {
        prefetch_l2((const T*)norm->weight + c);
        if (norm->bias) prefetch_l2((const T*)norm->bias + c);
      }
    if (phase == Phase::kOutput || phase == Phase::kCrossOutput) this->prefetch_keys(i, phase == Phase::kCrossOutput);
  }

  // ---- results ------------------------------------------------------------------------------------------------------

  __device__ void put(Phase phase, int i, int part, int row, int feature, float value, float up) {
    switch (phase) {
      case Phase::kQueryKeyValue:
        if (feature >= inner) return put_in_cache(i, row, feature - inner, value);
        [[fallthrough]];
      case Phase::kCrossQuery: a.query[(int64_t)row * inner + feature] = value; return;
      case Phase::kUp:
        value = activate((int)a.plan.activation, value);
        a.active[(int64_t)row * padded_row(a.plan.intermediate) + feature] = this->gated ? value * up : value;
        return;
      case Phase::kLogits: return put_logit(row, feature, value * (float)a.plan.logits_scale);
      default: a.branch[((int64_t)part * m + row) * stream_pitch + feature] = value;
    }
  }

  __device__ void put_in_cache(int i, int row, int feature, float value) {
    const int d = (int)a.plan.head_size, keys = (int)a.plan.kv_heads * d, is_value = feature >= keys;
    const int c = feature - is_value * keys;
    T* at = (T*)a.address[2 * i + is_value] + row * a.call.batch_stride + this->place(row) * a.call.row_stride;
    const int head = quotient(c, d);
    at[head * a.call.head_stride + c - head * d] = narrow<T>(value);
  }

  // Without a head the last norm, in place of logits.
  __device__ void put_hidden() const {
    if (blockIdx.x > 0) return;
    const int bits = this->operand_bits();
    for (int row = 0; row < m; ++row)
      for (int c = threadIdx.x; c < hidden; c += blockDim.x)
        ((T*)a.call.logits)[row * hidden + c] = narrow<T>(operand[row * a.pitch + operand_place(c, bits)]);
  }

  __device__ void put_logit(int row, int feature, float value) {
    const T rounded = narrow<T>(value);
    ((T*)a.call.logits)[(int64_t)row * a.plan.head.n + feature] = rounded;
    top = better(top, {widen(rounded), feature});
  }
};

template <class T, int ROWS>
__global__ void __launch_bounds__(kDecodeWarps* kWarp, 1) decode_kernel(const PYFUSED_GRID_CONSTANT DecodeArguments a) {
  PYFUSED_SHARED_BYTES(shared);
  Decode<T, ROWS>(a, shared).run();
}

// ---- launchers ------------------------------------------------------------------------------------------------------

using Kernel = void(DecodeArguments);

template <class T> Kernel* kernel_of(int64_t rows) {
  if (rows == 1) return decode_kernel<T, 1>;
  if (rows == 2) return decode_kernel<T, 2>;
  return rows <= 4 ? decode_kernel<T, 4> : decode_kernel<T, 8>;
}
int rows_kept(int64_t rows) { return rows > 4 ? 8 : rows > 2 ? 4 : (int)rows; }

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

size_t shared_bytes(const DecodePlan& p, const DecodeCall& c, int threads, bool by_columns, int element) {
  const int64_t widest = larger(larger(p.hidden, p.heads * p.head_size), p.intermediate);
  const int64_t queries = larger(p.heads / p.kv_heads, c.sources ? c.rows / c.sources : 1);
  const int64_t attention = attention_floats(queries, padded_head((int)p.head_size, 16 / element), threads / kWarp);
  const int64_t operand = c.rows * up(widest, kPitchUnit) * kPitchUnit;
  const int columns = kColumns * (by_columns ? 16 / element : 1);
  return block_bytes(threads, rows_kept(c.rows), columns, c.rows, p.hidden, larger(operand, attention));
}

int cross_chunks(const DecodePlan& p, const DecodeCall& c) { return c.sources ? most_chunks(c.sources * p.heads) : 1; }

// Divides scratch memory. Returns its bytes.
int64_t divide(const DecodePlan& p, const DecodeCall& c, addr scratch, int blocks, bool by_columns, DecodeArguments& a) {
  a.chunks = most_chunks(c.rows * p.kv_heads), a.cross_chunks = cross_chunks(p, c);
  const int64_t parts = c.rows * p.heads * larger(a.chunks, a.cross_chunks);
  addr at = scratch;
  const auto take = [&](int64_t count) {
    const addr from = at;
    at += up(count * 4, 256) * 256;
    return (float*)from;
  };
  a.barrier = (unsigned*)take(1);
  a.query = take(c.rows * p.heads * p.head_size), a.active = take(c.rows * padded_row(p.intermediate));
  a.branch = take(c.rows * padded_row(p.hidden) * (by_columns ? kMostParts : 1));
  a.part = take(parts * padded_row(p.head_size)), a.part_state = take(parts * 2);
  a.top = take(blocks * c.rows), a.winner = (int*)take(blocks * c.rows);
  return (int64_t)(at - scratch);
}

bool wide_keys(const DecodePlan& p, const DecodeCall& c, const DecodeArguments& a, int element) {
  int64_t strides = c.batch_stride | c.head_stride | c.row_stride | p.head_size;
  if (c.cross_caches) strides |= c.cross_batch_stride | c.cross_head_stride | c.cross_row_stride;
  addr found = (addr)(strides * element);
  for (int i = 0; i < kMostAddresses; ++i) found |= a.address[i];
  return found % 16 == 0;
}

}  // namespace

int64_t decode_shared(addr plan, addr call, int threads, bool by_columns, int dtype) {
  if (is_empty(*(const DecodePlan*)plan, *(const DecodeCall*)call)) return 0;
  const int element = dtype == 0 ? 4 : 2;
  return (int64_t)shared_bytes(*(const DecodePlan*)plan, *(const DecodeCall*)call, threads, by_columns, element);
}

int decode_blocks(addr plan, addr call, int threads, bool by_columns, int multiprocessors, int dtype, int device) {
  const auto& p = *(const DecodePlan*)plan;
  const auto& c = *(const DecodeCall*)call;
  if (is_empty(p, c)) return 0;
  const Launch launch{"decode", c.rows, p.hidden, device};
  const OnDevice guard(launch);
  int cooperative = 0, fit = 0;
  launch.check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
  if (!cooperative) return 0;
  const size_t bytes = shared_bytes(p, c, threads, by_columns, dtype == 0 ? 4 : 2);
  PYFUSED_BY_DTYPE(dtype, {
    auto kernel = kernel_of<T>(c.rows);
    allow_shared(launch, kernel, bytes);
    launch.check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, threads, bytes));
  })
  return fit > 0 ? multiprocessors : 0;
}

int64_t decode_scratch(addr plan, addr call, int blocks, bool by_columns) {
  if (is_empty(*(const DecodePlan*)plan, *(const DecodeCall*)call)) return 0;
  DecodeArguments a;
  return divide(*(const DecodePlan*)plan, *(const DecodeCall*)call, 0, blocks, by_columns, a);
}

int decode_most_addresses() { return kMostAddresses; }

void decode_forward(addr plan, addr call, addr scratch, int blocks, int threads, bool by_columns, bool wide, int dtype,
                    int device, addr stream) {
  DecodeArguments a{*(const DecodePlan*)plan, *(const DecodeCall*)call};
  const DecodePlan& p = a.plan;
  const DecodeCall& c = a.call;
  if (is_empty(p, c)) return;
  const Launch launch{"decode", c.rows, p.hidden, device};
  const OnDevice guard(launch);
  const int element = dtype == 0 ? 4 : 2;
  divide(p, c, scratch, blocks, by_columns, a);
  for (int64_t i = 0; i < 2 * p.layers; ++i) {
    a.address[i] = ((const addr*)c.caches)[i];
    if (c.cross_caches) a.address[2 * p.layers + i] = ((const addr*)c.cross_caches)[i];
  }
  a.pitch = (int)(up(larger(larger(p.hidden, p.heads * p.head_size), p.intermediate), kPitchUnit) * kPitchUnit);
  a.by_columns = by_columns, a.wide_weights = wide, a.wide_keys = wide_keys(p, c, a, element);
  const size_t bytes = shared_bytes(p, c, threads, by_columns, element);
  launch.check(cudaMemsetAsync(a.barrier, 0, sizeof(unsigned), (cudaStream_t)stream));
  PYFUSED_BY_DTYPE(dtype, {
    auto kernel = kernel_of<T>(c.rows);
    allow_shared(launch, kernel, bytes);
    PYFUSED_LAUNCH_COOPERATIVE(kernel, blocks, threads, bytes, stream, a);
  })
  launch.check();
}

}  // namespace pyfused::cuda
