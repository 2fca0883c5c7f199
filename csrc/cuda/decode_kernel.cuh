// decode on CUDA: one token per row through a whole decoder, at most 8 rows, in one persistent kernel.
//
// One block of 256 threads on each multiprocessor takes part in every phase, a product. Per layer:
//   "query, key and value"   norm, one product; keys and values go into the cache
//   "output"                 attention: chunks of keys (decode_attention.cuh); adds the chunks, one product
//   "cross query", "cross output"   the same, if there is an encoder
//   "up"                     norm, product with gate and inner, activation
//   "down"                   one product
// then "logits", and a token is chosen (decode_choice.cuh). Every block keeps the residual stream in its shared memory and
// computes the norms for itself: it reads 3 KB a row from the L2, which takes less time than to wait for another block's norm
// (decode_operand.cuh). Activations are float32 from the embedding to the logits; caches and logits have the weights' dtype.
// The next product's weights are on their way while a block waits (decode_product.cuh; decode_columns.cuh for weights stored
// transposed). No atomics on floats: the result is the same to the last bit, with any number of blocks.
//
// Between phases there is no barrier. A block sends floats through scratch memory, which starts as kAbsent, and whoever needs
// them looks until they have come (send() and receive() of cooperative.cuh). Each layer has scratch memory of its own, so
// nobody overwrites what another may still look at. Each phase needs all that the one before sent, so blocks stay together.
// Only the choice of a token has a barrier, because it reads the logits.
//
// An H100 ran it in bfloat16 with 129 keys, as a CUDA graph, with 1, 4 and 8 rows. Before, a barrier for the grid ended every
// phase and attention. Floors: the weights' bytes at 3.0 TB/s.
//                                                       floor   with barriers: 1, 4 rows   now: 1, 4, 8 rows
//   GPT-2 124M, 249 MB                                    83 us   327, 411 us                261, 379, 602 us
//   GPT-2 124M by columns, no head, 170 MB                57 us   303 us                     252, 434, 778 us
//   T5 1.1 base's decoder, 248 MB                         83 us   458 us                     356, 505, 773 us
// Neither memory nor the way from block to block sets the pace, but instructions: in a phase nothing repeats, and a warp needs
// six or seven cycles for each. Time stamps in a layer of GPT-2 with one row, 37,000 cycles at 1.94 GHz:
//   requests of the next product's weights       7,000      norms                            3,400
//   looks for a branch and `down`'s operand      8,600      products with their sums         8,600
//   attention 1,900, and until its chunks have come and are added 7,500
// So what saves instructions helps. Before, the same layer took 51,000 cycles. Now a warp keeps how a product is divided, and
// kernels for plain weights (Form) have 100 KB of instructions in their loop, not 280. What brought weights earlier did not
// help, for no product waits for them: a second ring for the product behind the next, or a layer's weights fetched into the L2
// a layer ahead. With 8 rows a block reads 98 KB of `down`'s operand, 9 us a layer.
//
// Choosing the likeliest token adds a barrier: 4 us with the search. A draw is another kernel (decode_draw.cuh).
#pragma once

#include "decode_operand.cuh"

namespace pyfused::cuda {
namespace {

template <class T, int ROWS, Form FORM> struct Decode : DecodeOperand<T, ROWS, FORM> {
  using Base = DecodeOperand<T, ROWS, FORM>;
  using Base::a, Base::m, Base::layers, Base::operand, Base::top, Base::hidden, Base::inner, Base::stream_pitch,
      Base::branch_parts, Base::has_cross, Base::embed, Base::prepare, Base::norm_of;

  __device__ Decode(const DecodeArguments& arguments, unsigned char* shared) : Base(arguments, shared) {}

  __device__ void run() {
    const int count = (int)a.plan.layers;
    fetch_layer(0);
    cp_async_commit();
    if (threadIdx.x == 0) *this->head = a.plan.head, *this->final_norm = a.plan.final_norm;
    cp_async_wait<0>();
    __syncthreads();
    has_cross = count && layers[0].cross_query.n;
    Phase phase = count ? Phase::kQueryKeyValue : Phase::kLogits;
    bool begins = true;
    for (int i = 0;;) {
      const DecodeLayer& layer = layers[i % 2];
      if (phase == Phase::kOutput || phase == Phase::kCrossOutput) {  // before the requests: all blocks wait for the result
        const bool cross = phase == Phase::kCrossOutput;
        if (this->attends(cross)) {
          this->attend(i, cross, cross ? layer.cross_scale : layer.scale);
          __syncthreads();  // its states have been read
        }
      }
      announce(phase, layer, i);
      if (begins) {
        begins = false;
        embed();
        __syncthreads();
      }
      if (phase == Phase::kQueryKeyValue) fetch_layer(i + 1);  // the place of the last layer, which no thread reads now
      prepare(phase, layer, i);
      __syncthreads();
      if (phase == Phase::kLogits && !a.plan.head.n) return put_hidden();
      this->multiply([&](int part, int row, int feature, float value, float up) {
        put(phase, i, part, row, feature, value, up);
      });
      if (phase == Phase::kLogits) break;
      __syncthreads();  // operand and sums have been read, and the next layer's struct has come
      if (!norm_of(phase, layer)) branch_parts = this->parts;
      if (phase == Phase::kDown) ++i;
      phase = next_product(phase, has_cross, i == count);
    }
    if (a.call.chosen) this->choose();
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
  // block attends to after it.
  __device__ void announce(Phase phase, const DecodeLayer& layer, int i) {
    this->request(phase, layer);
    constexpr int LINE = 128 / sizeof(T);
    if (const DecodeNorm* norm = norm_of(phase, layer))
      for (int c = (blockDim.x - 1 - threadIdx.x) * LINE; c < hidden; c += blockDim.x * LINE) {  // the last warps have less to do
        prefetch_l2((const T*)norm->weight + c);
        if (norm->bias) prefetch_l2((const T*)norm->bias + c);
      }
    if (phase == Phase::kQueryKeyValue || phase == Phase::kCrossQuery)
      if (const bool cross = phase == Phase::kCrossQuery; this->attends(cross)) this->prefetch_keys(i, cross);
  }

  // ---- results ------------------------------------------------------------------------------------------------------

  __device__ void put(Phase phase, int i, int part, int row, int feature, float value, float up) {
    float* at = phase == Phase::kLogits ? nullptr : this->result_of(phase, i);
    switch (phase) {
      case Phase::kQueryKeyValue:
        if (feature >= inner) value = widen(narrow<T>(value));  // as the cache will have it
        send(at + row * padded_row(this->attended_features(false)) + feature, value);
        if (feature >= inner) put_in_cache(i, row, feature - inner, value);
        return;
      case Phase::kCrossQuery: send(at + row * padded_row(inner) + feature, value); return;
      case Phase::kUp:
        value = activate((int)a.plan.activation, value);
        send(at + row * padded_row((int)a.plan.intermediate) + feature, this->gated ? value * up : value);
        return;
      case Phase::kLogits: return put_logit(row, feature, value * (float)a.plan.logits_scale);
      default: send(at + (part * m + row) * stream_pitch + feature, value);
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

template <class T, int ROWS, Form FORM>
__global__ void __launch_bounds__(kDecodeWarps* kWarp, 1) decode_kernel(const PYFUSED_GRID_CONSTANT DecodeArguments a) {
  PYFUSED_SHARED_BYTES(shared);
  Decode<T, ROWS, FORM>(a, shared).run();
}

}  // namespace
}  // namespace pyfused::cuda
