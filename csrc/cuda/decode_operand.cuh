// What does a product of decode multiply, and how does it come into every block's shared memory? The residual stream and its norm,
// the hidden row, or attention's result.
//
// What other blocks send comes through the L2 (send() of cooperative.cuh). A thread looks at all that it needs together, 16
// bytes at a time, and has the same columns of all rows, for which it reads a norm's weights once.
#pragma once

#include "decode_choice.cuh"

namespace pyfused {
namespace {

template <class T, int ROWS, Form FORM> struct DecodeOperand : DecodeChoice<T, ROWS, FORM> {
  using Base = DecodeChoice<T, ROWS, FORM>;
  using Base::a, Base::m, Base::warp, Base::lane, Base::warps, Base::stream, Base::sums, Base::operand;

  const int hidden = (int)this->a.plan.hidden, inner = (int)(this->a.plan.heads * this->a.plan.head_size);
  const int stream_pitch = padded_row(hidden);
  int branch_parts = 1;  // of the product that sent the branch
  bool has_cross = false;

  __device__ DecodeOperand(const DecodeArguments& arguments, unsigned char* shared) : Base(arguments, shared) {}

  // stream = token_embedding[tokens] + position_embedding[positions]. An id out of range takes the nearest row: it never reads
  // beyond the table. The reads of all rows are under way at once.
  __device__ void embed() {
    const DecodeMatrix &t = a.plan.token_embedding, &p = a.plan.position_embedding;
    int64_t token[ROWS], at[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int b = min(r, m - 1);
      token[r] = row_in(t, ((const int64_t*)a.call.tokens)[b]);
      at[r] = row_in(p, a.call.position_ids ? ((const int64_t*)a.call.position_ids)[b] : this->place(b));
    }
    for (int c = threadIdx.x; c < stream_pitch; c += blockDim.x) {
      float x[ROWS] = {};
      if (c < hidden) {
        if (t.scale) {
#pragma unroll
          for (int r = 0; r < ROWS; ++r)
            x[r] = widen(((const int8_t*)t.weight)[token[r] * t.stride + c]) * ((const float*)t.scale)[token[r]];
        } else {
#pragma unroll
          for (int r = 0; r < ROWS; ++r) x[r] = widen(((const T*)t.weight)[token[r] * t.stride + c]);
        }
        if (p.n) {
#pragma unroll
          for (int r = 0; r < ROWS; ++r) x[r] += widen(((const T*)p.weight)[at[r] * p.stride + c]);
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (r < m) stream[r * stream_pitch + c] = x[r];
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
      case Phase::kLogits: return this->final_norm;
      default: return nullptr;
    }
  }

  // The product's operand, from what the phases before wrote.
  __device__ void prepare(Phase phase, const DecodeLayer& layer, int i) {
    const int bits = this->operand_bits();
    if (const DecodeNorm* norm = norm_of(phase, layer))
      return normalise(*norm, bits, branch_of(phase, i));
    const int k = phase == Phase::kDown ? (int)a.plan.intermediate : inner;
    if (phase == Phase::kDown) {
      read_rows<ROWS, (ROWS < 4 ? 4 / ROWS : 1)>(this->result_of(Phase::kUp, i), m, k, [&](int row, int c, Pack<float, 4> quad) {
#pragma unroll
        for (int e = 0; e < 4; ++e) quad.at[e] = c + e < k ? quad.at[e] : 0.0f;
        store(operand_at(row, c, bits), quad);
      });
    } else {
      const bool whole = a.plan.head_size % 4 == 0;
      this->attended(i, phase == Phase::kCrossOutput, [&](int row, int c, int count, const Pack<float, 4>& quad) {
        if (whole) return store(operand_at(row, c, bits), quad);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (e < count) *operand_at(row, c + e, bits) = quad.at[e];
      });
    }
    for (int c = (phase == Phase::kDown ? padded_row(k) : k) + threadIdx.x; c < operand_width(k, bits); c += blockDim.x)
      for (int row = 0; row < m; ++row) *operand_at(row, c, bits) = 0;
  }

  // The branch that the stream takes up before a phase's norm, or null.
  __device__ const float* branch_of(Phase phase, int i) const {
    switch (phase) {
      case Phase::kCrossQuery: return this->result_of(Phase::kOutput, i);
      case Phase::kUp: return this->result_of(has_cross ? Phase::kCrossOutput : Phase::kOutput, i);
      default: return i ? this->result_of(Phase::kDown, i - 1) : nullptr;
    }
  }

  __device__ float* operand_at(int row, int c, int bits) const { return operand + row * a.pitch + operand_place(c, bits); }
  // k, with the zeros up to the end of a step.
  __device__ int operand_width(int k, int bits) const { return this->steps_of(k, bits) << (bits + 5); }

  // use(row, c, quad) for all quads of rows of k floats in scratch memory. A thread has the same quads of all rows. QUADS of
  // TOGETHER rows are under way at once.
  template <int TOGETHER, int QUADS, class Use>
  __device__ void read_rows(const float* from, int rows, int k, const Use& use) const {
    const int pitch = padded_row(k), apart = 4 * (int)blockDim.x;
    for (int start = 4 * threadIdx.x; start < pitch; start += QUADS * apart)
      for (int first = 0; first < rows; first += TOGETHER) {
        Pack<float, 4> found[QUADS * TOGETHER];
        receive(
            found,
            [&](int i) {
              const int c = start + i / TOGETHER * apart, row = first + i % TOGETHER;
              return c < pitch && row < rows ? from + (int64_t)row * pitch + c : nullptr;
            },
            [&](int i) { return k - start - i / TOGETHER * apart; });
#pragma unroll
        for (int u = 0; u < QUADS; ++u)
#pragma unroll
          for (int r = 0; r < TOGETHER; ++r)
            if (const int c = start + u * apart; c < pitch && first + r < rows) use(first + r, c, found[u * TOGETHER + r]);
      }
  }

  // stream += the parts of a branch, in order.
  __device__ void add(const float* branch) {
    constexpr int PARTS = FORM == Form::kRows ? 1 : kMostParts;  // by rows a product has one part
    read_rows<(ROWS > PARTS ? ROWS : PARTS), 1>(branch, branch_parts * m, hidden, [&](int row, int c, const Pack<float, 4>& quad) {
      float* to = stream + (ROWS == 1 ? 0 : row - quotient(row, m) * m) * stream_pitch + c;
      Pack<float, 4> x = load<4>(to);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c + e < hidden) x.at[e] += quad.at[e];
      store(to, x);
    });
  }

  // Elements c .. c + 3 of a norm's weight or bias, as bits: taking them apart would wait for the L2.
  using Bits = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  __device__ Bits read_norm(std::uintptr_t from, int c) const {
    const T* at = (const T*)from + c;
    if (from && c + 4 <= hidden && (std::uintptr_t)at % sizeof(Bits) == 0) return __ldcg((const Bits*)at);
    Pack<T, 4> out;
    for (int e = 0; e < 4; ++e) out.at[e] = from && c + e < hidden ? __ldcg(at + e) : narrow<T>(0.0f);
    Bits bits;
    memcpy(&bits, &out, sizeof(Bits));
    return bits;
  }

  // The stream takes up the last branch, and the operand is its norm. Statistics in float32; a layer norm's variance is the
  // mean of squared deviations. A thread has the same quads of all rows throughout, and reads their weights together with the
  // branch.
  __device__ void normalise(const DecodeNorm& norm, int bits, const float* branch) {
    int c = 4 * threadIdx.x;
    Bits weight = read_norm(norm.weight, c), bias = read_norm(norm.bias, c);
    if (branch) add(branch);
    const float per_hidden = __fdividef(1.0f, (float)hidden);
    float mean[ROWS] = {}, rstd[ROWS];
    if (!a.plan.is_rms) {
      find_sums(mean, [](int, float v) { return v; }, sums);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) mean[r] *= per_hidden;
    }
    find_sums(rstd, [&](int r, float v) { return (v - mean[r]) * (v - mean[r]); }, sums + warps * ROWS);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) rstd[r] = rsqrtf(rstd[r] * per_hidden + (float)norm.eps);
    for (const int width = operand_width(hidden, bits); c < width; c += 4 * blockDim.x) {
      Pack<T, 4> w, b;
      memcpy(&w, &weight, sizeof(Bits)), memcpy(&b, &bias, sizeof(Bits));
      if (c + 4 * (int)blockDim.x < width)
        weight = read_norm(norm.weight, c + 4 * blockDim.x), bias = read_norm(norm.bias, c + 4 * blockDim.x);
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        if (row >= m) break;
        Pack<float, 4> x = {};
        if (c < hidden) x = load<4>(stream + row * stream_pitch + c);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          x.at[e] = c + e < hidden ? (x.at[e] - mean[row]) * rstd[row] * widen(w.at[e]) + widen(b.at[e]) : 0.0f;
        store(operand_at(row, c, bits), x);
      }
    }
  }

  // The sums of value(row, x) over the stream's rows, for every thread. Warps leave theirs in `parts`, [warp][row], in the
  // product's sums, which nobody reads now.
  template <class Value> __device__ void find_sums(float (&sum)[ROWS], const Value& value, float* parts) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum[r] = 0;
    for (int c = 4 * threadIdx.x; c < hidden; c += 4 * blockDim.x)
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (r >= m) break;
        const Pack<float, 4> x = load<4>(stream + r * stream_pitch + c);
        float of[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) of[e] = c + e < hidden ? value(r, x.at[e]) : 0.0f;
        sum[r] += (of[0] + of[1]) + (of[2] + of[3]);
      }
    const float total = spread_sum<ROWS>(sum);
    if (lane % (kWarp / ROWS) == 0) parts[warp * ROWS + lane / (kWarp / ROWS)] = total;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum[r] = 0;
    constexpr int WIDE = ROWS < 4 ? ROWS : 4, AT_ONCE = kDecodeWarps / WIDE;  // 8 to 16 reads on their way
#pragma unroll 1
    for (int first = 0; first < warps; first += AT_ONCE) {
      Pack<float, WIDE> found[AT_ONCE][ROWS / WIDE];
#pragma unroll
      for (int w = 0; w < AT_ONCE; ++w)
#pragma unroll
        for (int r = 0; r < ROWS; r += WIDE) found[w][r / WIDE] = load<WIDE>(parts + min(first + w, warps - 1) * ROWS + r);
#pragma unroll
      for (int w = 0; w < AT_ONCE; ++w)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sum[r] += first + w < warps ? found[w][r / WIDE].at[r % WIDE] : 0.0f;
    }
  }
};

}  // namespace
}  // namespace pyfused
