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
// computes the norms for itself: it reads 3 KB a row from the L2, which takes less time than a barrier. Activations are float32
// from the embedding to the logits; caches and logits have the weights' dtype. The next product's weights are on their way
// while a block waits (decode_product.cuh; decode_columns.cuh for weights stored transposed). No atomics on floats: the result
// is the same to the last bit, with any number of blocks.
//
// Floors and predictions for an H100, one row, bfloat16, 128 keys, 3.0 TB/s. Not yet measured.
//   GPT-2 124M    weights 249 MB, 83 us. 60 barriers of 1.2 to 2 us: 72 to 120 us. With a barrier come 0.7 us to read the
//                 operand from the L2 and 0.6 us for norm, product and sums: 60 x 2.5 = 150 us. The layers' 170 MB hide behind.
//                 The head's 77 MB take 26 us. In all about 180 us.
//   T5 1.1 base   its decoder, 248 MB, 83 us. 96 barriers: 115 to 190 us. 96 x 2.5 = 240 us, and 16 us for the head's 49 MB.
//                 In all about 260 us.
//   GPT-2 124M as transformers stores it, without its head: 170 MB by columns, 57 us. 60 barriers: 60 x 2.5 = 150 us. Requests
//                 of 64 bytes hold the load unit 0.4 us for 49 KB, twice as long as whole lines, and a branch of 4 parts is
//                 read in 0.1 us more: 48 x 0.2 + 24 x 0.1 = 12 us. In all about 160 us.
// Choosing a token adds a barrier. A draw from 50,257 logits in bfloat16 adds a pass of one block over them and searches. By
// index 7 and 2 us; by score 12 us, for the sums of 64 bits are compare-and-swap loops, and 7 us for each search (4 to list a
// bucket, 3 for the bits). So 9 us with a temperature alone, 26 with top p. As operators it is 15 to 20 launches, one of them a
// sort. So barriers, not bytes, set the pace of small models, and int8 shortens only the head there. Of GPT-2 XL's 3.1 GB
// (1,040 us, 240 barriers) about 60% hide behind barriers.
#include "kernels.h"

#include "decode_choice.cuh"

namespace pyfused::cuda {
namespace {

// ---- kernel ---------------------------------------------------------------------------------------------------------

template <class T, int ROWS> struct Decode : DecodeChoice<T, ROWS> {
  using Base = DecodeChoice<T, ROWS>;
  using Base::a, Base::m, Base::warp, Base::lane, Base::warps, Base::layers, Base::stream, Base::operand, Base::top;

  const int hidden = (int)this->a.plan.hidden, inner = (int)(this->a.plan.heads * this->a.plan.head_size);
  int branch_parts = 1;  // of the product that wrote the branch

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
    announce(phase, layers[0]);
    embed();
    for (int i = 0;;) {
      const DecodeLayer& layer = layers[i % 2];
      const char* ended = name_of(phase);
      if (phase == Phase::kAttend || phase == Phase::kCrossAttend) {
        const bool cross = phase == Phase::kCrossAttend;
        this->attend(i, cross, cross ? layer.cross_scale : layer.scale);
        phase = cross ? Phase::kCrossOutput : Phase::kOutput;
      } else {
        if (phase == Phase::kQueryKeyValue) fetch_layer(i + 1);  // the place of the last layer, which no thread reads now
        prepare(phase, layer, i);
        __syncthreads();
        if (phase == Phase::kLogits && !a.plan.head.n) return put_hidden();
        this->multiply([&](int part, int row, int feature, float value, float up) {
          put(phase, i, part, row, feature, value, up);
        });
        if (phase == Phase::kLogits) break;
        if (!norm_of(phase, layer)) branch_parts = this->parts;
        const Phase attention = phase == Phase::kQueryKeyValue ? Phase::kAttend : Phase::kCrossAttend;
        const bool attends = phase == Phase::kQueryKeyValue || phase == Phase::kCrossQuery;
        if (phase == Phase::kDown) ++i;
        phase = next_product(phase, has_cross, i == count);
        announce(phase, layers[i % 2]);
        if (attends) phase = attention;
      }
      grid_barrier(a.barrier, ended);
    }
    if (a.call.chosen) this->choose();
  }

  // A barrier has the name of the phase that it ends.
  __device__ static const char* name_of(Phase phase) {
    switch (phase) {
      case Phase::kQueryKeyValue: return "query, key and value";
      case Phase::kAttend: return "attention";
      case Phase::kOutput: return "output";
      case Phase::kCrossQuery: return "cross query";
      case Phase::kCrossAttend: return "cross attention";
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

  // stream = token_embedding[tokens] + position_embedding[positions]. An id out of range takes the nearest row: it never reads
  // beyond the table.
  __device__ void embed() {
    const DecodeMatrix &t = a.plan.token_embedding, &p = a.plan.position_embedding;
    for (int b = 0; b < m; ++b) {
      const int64_t token = row_in(t, ((const int64_t*)a.call.tokens)[b]);
      const int64_t at = row_in(p, a.call.position_ids ? ((const int64_t*)a.call.position_ids)[b] : this->place(b));
      for (int c = threadIdx.x; c < hidden; c += blockDim.x) {
        float x = t.scale ? widen(((const int8_t*)t.weight)[token * t.stride + c]) * ((const float*)t.scale)[token]
                          : widen(((const T*)t.weight)[token * t.stride + c]);
        if (p.n) x += widen(((const T*)p.weight)[at * p.stride + c]);
        stream[b * hidden + c] = x;
      }
    }
  }
  __device__ static int64_t row_in(const DecodeMatrix& table, int64_t id) {
    return id < 0 || table.n == 0 ? 0 : id < table.n ? id : table.n - 1;
  }

  // The norm that makes a phase's operand, or null.
  __device__ const DecodeNorm* norm_of(Phase phase, const DecodeLayer& layer) const {
    switch (phase) {
      case Phase::kQueryKeyValue: return &layer.attention_norm;
      case Phase::kCrossQuery: return &layer.cross_norm;
      case Phase::kUp: return &layer.feed_forward_norm;
      case Phase::kLogits: return &a.plan.final_norm;
      default: return nullptr;
    }
  }

  // Has the weights of a product and of its norm sent before the barrier that its operand waits for.
  __device__ void announce(Phase phase, const DecodeLayer& layer) {
    this->request(phase, &layer);
    constexpr int LINE = 128 / sizeof(T);
    if (const DecodeNorm* norm = norm_of(phase, layer))
      for (int c = threadIdx.x * LINE; c < hidden; c += blockDim.x * LINE) {
        prefetch_l2((const T*)norm->weight + c);
        if (norm->bias) prefetch_l2((const T*)norm->bias + c);
      }
  }

  // The product's operand, from what the phases before wrote.
  __device__ void prepare(Phase phase, const DecodeLayer& layer, int i) {
    if (const DecodeNorm* norm = norm_of(phase, layer)) {
      normalise(*norm, phase == Phase::kLogits ? a.plan.layers > 0 : phase != Phase::kQueryKeyValue || i > 0);
    } else if (phase == Phase::kDown) {
      const int f = (int)a.plan.intermediate;
      fill(f, [&](int row, int c) { return __ldcg(a.active + (int64_t)row * f + c); });
    } else {
      fill(inner, [&](int row, int c) { return this->attended(phase == Phase::kCrossOutput, row, c); });
    }
  }

  // operand = value(row, c) for c < k, and zeros up to the end of a step. Four reads are under way at once.
  template <class Value> __device__ void fill(int k, const Value& value) {
    const int bits = this->operand_bits(), width = this->steps_of(k, bits) << (bits + 5), all = m * width;
    constexpr int AT_ONCE = 4;
    for (int start = threadIdx.x; start < all; start += AT_ONCE * blockDim.x) {
      float found[AT_ONCE];
      int to[AT_ONCE];
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) {
        const int i = start + u * blockDim.x, row = ROWS == 1 ? 0 : i / width, c = i - row * width;
        to[u] = row * a.pitch + operand_place(c, bits);
        found[u] = i < all && c < k ? value(row, c) : 0.0f;
      }
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u)
        if (start + u * (int)blockDim.x < all) operand[to[u]] = found[u];
    }
  }

  // stream += the parts of the last branch, in order. Up to 16 reads are under way at once.
  __device__ void add_branch() {
    constexpr int AT_ONCE = 4;
    const int all = m * hidden;
    for (int start = threadIdx.x; start < all; start += AT_ONCE * blockDim.x) {
      float sum[AT_ONCE] = {};
#pragma unroll 4
      for (int part = 0; part < branch_parts; ++part)
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u)
          if (const int at = start + u * blockDim.x; at < all) sum[u] += __ldcg(a.branch + (int64_t)part * all + at);
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u)
        if (const int at = start + u * blockDim.x; at < all) stream[at] += sum[u];
    }
  }

  // The stream takes up the last branch, and the operand is its norm. Statistics in float32; a layer norm's variance is the
  // mean of squared deviations. The warps of a row compute its statistics each for itself: no barrier between.
  __device__ void normalise(const DecodeNorm& norm, bool adds) {
    if (adds) add_branch();
    __syncthreads();
    const T *weight = (const T*)norm.weight, *bias = (const T*)norm.bias;
    const int sharing = m >= warps ? 1 : (warps - 1 - warp % m) / m + 1, part = m >= warps ? 0 : warp / m;
    const int bits = this->operand_bits(), width = this->steps_of(hidden, bits) << (bits + 5);
    for (int row = warp % m; row < m; row += warps) {
      const float* x = stream + row * hidden;
      float mean = 0, squares = 0;
      if (!a.plan.is_rms) {
        for (int c = lane; c < hidden; c += kWarp) mean += x[c];
        mean = warp_sum(mean) / hidden;
      }
      for (int c = lane; c < hidden; c += kWarp) squares += (x[c] - mean) * (x[c] - mean);
      const float rstd = 1.0f / sqrtf(warp_sum(squares) / hidden + (float)norm.eps);
      for (int c = part * kWarp + lane; c < width; c += sharing * kWarp) {
        float y = 0;
        if (c < hidden) y = (x[c] - mean) * rstd * widen(weight[c]) + (bias ? widen(bias[c]) : 0.0f);
        operand[row * a.pitch + operand_place(c, bits)] = y;
      }
    }
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
        a.active[(int64_t)row * a.plan.intermediate + feature] = this->gated ? value * up : value;
        return;
      case Phase::kLogits: return put_logit(row, feature, value * (float)a.plan.logits_scale);
      default: a.branch[((int64_t)part * m + row) * hidden + feature] = value;
    }
  }

  __device__ void put_in_cache(int i, int row, int feature, float value) {
    const int d = (int)a.plan.head_size, keys = (int)a.plan.kv_heads * d, is_value = feature >= keys;
    const int c = feature - is_value * keys;
    T* at = (T*)a.address[2 * i + is_value] + row * a.call.batch_stride + this->place(row) * a.call.row_stride;
    at[c / d * a.call.head_stride + c % d] = narrow<T>(value);
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
  a.query = take(c.rows * p.heads * p.head_size), a.active = take(c.rows * p.intermediate);
  a.branch = take(c.rows * p.hidden * (by_columns ? kMostParts : 1));
  a.part = take(parts * p.head_size), a.part_state = take(parts * 2);
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
