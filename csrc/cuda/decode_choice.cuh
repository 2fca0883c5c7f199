// How does decode choose the next token in its own kernel? The likeliest, or one drawn with a temperature from the top k, the
// top p, or all. kernels/shared/draw.py has the same in plain PyTorch, for the same numbers in [0, 1).
//
// A block draws for a row. Tokens have an order: by falling score, then by index; or by index alone if nothing is cut. A
// token's weight is e^score as an integer in units of 2^-44, so no sum depends on its order: the token is the same with any
// number of blocks. Weights of 0 are left out: less than 2^-45 of the likeliest token's probability each.
//
// The end of the top k, the end of the top p, and the draw are the same search: which token has a sum before it of at most x,
// and with it of more? First among kBuckets stretches of the order, whose sums one pass over the logits finds. Then among the
// tokens of one bucket, bit by bit of a key that is different for each. They lie in shared memory; too many are read again.
#pragma once

#include "decode_attention.cuh"

namespace pyfused {

constexpr int kBuckets = 512;
constexpr float kLowest = -31.2f;  // a lower score has the weight 0

using Weight = unsigned long long;

namespace {

template <class T, int ROWS, Form FORM> struct DecodeChoice : DecodeAttention<T, ROWS, FORM> {
  using Base = DecodeAttention<T, ROWS, FORM>;
  using Base::a, Base::m, Base::warp, Base::lane, Base::warps, Base::sums, Base::ring, Base::kSums;

  Top top{-INFINITY, 0x7fffffff};  // of the logits that this lane wrote, all of one row

  __device__ DecodeChoice(const DecodeArguments& arguments, unsigned char* shared) : Base(arguments, shared) {}

  // Writes the tokens of all rows. The grid waits once. -1 where the largest logit is not finite.
  __device__ void choose() {
    put_top();
    this->barrier.arrive();
    this->barrier.wait("logits");
    for (int row = blockIdx.x; row < m; row += gridDim.x) {
      const Top best = best_of(row);
      int64_t token = fabsf(best.value) < INFINITY ? best.token : -1;
      if (token >= 0 && a.call.uniform) token = draw(row, best.value);
      if (threadIdx.x == 0) ((int64_t*)a.call.chosen)[row] = token;
    }
  }

 private:
  // The likeliest token of each row among the block's.
  __device__ void put_top() const {
    float* values = sums;
    int* tokens = (int*)(values + warps * kSums);
    __syncthreads();  // the product's sums have been read
    if (lane < kSums) values[warp * kSums + lane] = top.value, tokens[warp * kSums + lane] = top.token;
    __syncthreads();
    if ((int)threadIdx.x < m) {
      Top best{-INFINITY, 0x7fffffff};
      for (int w = 0; w < warps; ++w)
        for (int c = 0; c < kColumns; ++c) {
          const int at = w * kSums + threadIdx.x * kColumns + c;
          best = better(best, {values[at], tokens[at]});
        }
      a.top[blockIdx.x * m + threadIdx.x] = best.value, a.winner[blockIdx.x * m + threadIdx.x] = best.token;
    }
  }

  // The likeliest token of a row. Each warp finds it for itself.
  __device__ Top best_of(int row) const {
    Top best{-INFINITY, 0x7fffffff};
    constexpr int AT_ONCE = 5;  // one trip to the L2 for up to 160 blocks
    for (int first = lane; first < (int)gridDim.x; first += AT_ONCE * kWarp) {
      Top found[AT_ONCE];
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) {
        const int at = min(first + u * kWarp, (int)gridDim.x - 1) * m + row;  // the last one again and again does no harm
        found[u] = {__ldcg(a.top + at), __ldcg(a.winner + at)};
      }
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) best = better(best, found[u]);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      best = better(best, {__shfl_xor_sync(kAllLanes, best.value, offset), __shfl_xor_sync(kAllLanes, best.token, offset)});
    return best;
  }

  // ---- a draw -------------------------------------------------------------------------------------------------------

  // A row's scores, and how they are divided.
  struct Scores {
    const T* logits;
    float most, temperature;
    int count, stretch;  // tokens; of them in a bucket, if their order is by index
    bool by_score;

    __device__ float of(float logit) const { return (logit - most) / temperature + 0.0f; }  // no -0
    __device__ int bucket(int token, float score) const {
      return by_score ? min(kBuckets - 1, (int)(score * (kBuckets / kLowest))) : token / stretch;
    }
    // Larger for a token that comes before another.
    __device__ Weight key(int token, float score) const {
      const unsigned bits = __float_as_uint(score), rising = score < 0 ? ~bits : bits | 0x80000000u;
      return (Weight)(by_score ? rising : 0) << 32 | ~(unsigned)token;
    }
  };
  __device__ static Weight weight(float score) {
    return score < kLowest ? 0 : (Weight)(expf(score) * 0x1p44f + 0.5f);
  }

  // What a draw keeps in the product's ring, which is free then.
  struct Table {
    Weight mass[kBuckets];
    unsigned count[kBuckets];
    Weight parts[2][kDecodeWarps];    // of reductions, by turns
    Weight mass_before, count_before;  // of the bucket that a search found
    unsigned bucket, listed;
  };
  __device__ Table& table() const { return *(Table*)ring; }
  __device__ Weight* keys() const { return (Weight*)(ring + (sizeof(Table) + 15) / 16 * 16); }  // then as many weights
  __device__ int room() const { return (kDepth * kColumns * 16 * (int)blockDim.x - (int)sizeof(Table) - 15) / 16; }

  struct Sum {
    __device__ Weight operator()(Weight x, Weight y) const { return x + y; }
  };
  struct Or {
    __device__ Weight operator()(Weight x, Weight y) const { return x | y; }
  };

  // Over the block; every thread gets it. `turn` alternates between calls, so that one barrier is enough.
  template <class Op> __device__ Weight reduced(Weight value, const Op& op, int& turn) const {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
    Weight* parts = table().parts[turn];
    turn ^= 1;
    if (lane == 0) parts[warp] = value;
    __syncthreads();
    Weight all = parts[0];
    for (int w = 1; w < warps; ++w) all = op(all, parts[w]);
    return all;
  }

  // visit(token, score) for tokens begin .. end - 1, and with a score of -inf for what fills the last warps up.
  template <int AT_ONCE, class Visit> __device__ void scan(const Scores& s, int begin, int end, const Visit& visit) const {
    for (int first = begin + threadIdx.x; first - (int)threadIdx.x < end; first += AT_ONCE * blockDim.x) {
      float logit[AT_ONCE];
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) {
        const int token = first + u * blockDim.x;
        logit[u] = token < end ? widen(__ldcg(s.logits + token)) : -INFINITY;
      }
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) visit(first + u * (int)blockDim.x, s.of(logit[u]));
    }
  }

  // The sums of all buckets.
  __device__ void fill(const Scores& s) const {
    Table& t = table();
    for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) t.mass[i] = 0, t.count[i] = 0;
    __syncthreads();
    scan<8>(s, 0, s.count, [&](int token, float score) {
      Weight w = weight(score);
      if (s.by_score) {
        if (!w) return;
        const int bucket = s.bucket(token, score);
        atomicAdd(&t.mass[bucket], w);
        atomicAdd(&t.count[bucket], 1u);
      } else {  // a warp's tokens share a bucket
        for (int offset = kWarp / 2; offset > 0; offset /= 2) w += __shfl_xor_sync(kAllLanes, w, offset);
        if (lane == 0 && w) atomicAdd(&t.mass[s.bucket(token, score)], w);
      }
    });
    __syncthreads();
  }

  // Finds the bucket with the sum x, which is below the sum of all. Warp 0 calls it.
  __device__ void find_bucket(bool by_count, Weight x) const {
    Table& t = table();
    constexpr int SHARE = kBuckets / kWarp;
    Weight mass = 0, count = 0;
    for (int i = lane * SHARE; i < (lane + 1) * SHARE; ++i) mass += t.mass[i], count += t.count[i];
    Weight masses = mass, counts = count;  // up to this lane's
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const Weight m0 = __shfl_up_sync(kAllLanes, masses, offset), c0 = __shfl_up_sync(kAllLanes, counts, offset);
      if (lane >= offset) masses += m0, counts += c0;
    }
    masses -= mass, counts -= count;
    const Weight before = by_count ? counts : masses;
    if (before > x || x - before >= (by_count ? count : mass)) return;
    int i = lane * SHARE;
    while (x - (by_count ? counts : masses) >= (by_count ? t.count[i] : t.mass[i])) {
      masses += t.mass[i], counts += t.count[i];
      ++i;
    }
    t.bucket = i, t.mass_before = masses, t.count_before = counts, t.listed = 0;
  }

  struct Found {
    int token;
    Weight through;  // the weights up to the token's own
  };

  // The token with at most x before it and more than x with it: weights, or tokens.
  __device__ Found find(const Scores& s, bool by_count, Weight x, int& turn) const {
    Table& t = table();
    __syncthreads();  // the last search's list has been read
    if (warp == 0) find_bucket(by_count, x);
    __syncthreads();
    const int bucket = t.bucket, begin = s.by_score ? 0 : bucket * s.stretch;
    const int end = s.by_score ? s.count : min(begin + s.stretch, s.count), most = room();
    Weight *key = keys(), *weights = key + most;
    scan<8>(s, begin, end, [&](int token, float score) {
      const Weight w = weight(score);
      if (!w || s.bucket(token, score) != bucket) return;
      if (const unsigned at = atomicAdd(&t.listed, 1u); at < (unsigned)most) key[at] = s.key(token, score), weights[at] = w;
    });
    __syncthreads();
    const int listed = (int)t.listed;
    // Calls visit(key, weight) for this thread's share of the bucket's tokens.
    const auto members = [&](const auto& visit) {
      if (listed <= most) {
        for (int i = threadIdx.x; i < listed; i += blockDim.x) visit(key[i], weights[i]);
      } else {
        scan<1>(s, begin, end, [&](int token, float score) {
          if (const Weight w = weight(score); w && s.bucket(token, score) == bucket) visit(s.key(token, score), w);
        });
      }
    };
    Weight ones = 0, zeros = 0;
    members([&](Weight k, Weight) { ones |= k, zeros |= ~k; });
    ones = reduced(ones, Or{}, turn), zeros = reduced(zeros, Or{}, turn);
    const Weight vary = ones & zeros;  // the bits in which the keys differ
    Weight bound = ones & ~zeros;
    x -= by_count ? t.count_before : t.mass_before;
    for (int bit = 63; bit >= 0; --bit) {  // the largest bound that leaves more than x
      if (!(vary >> bit & 1)) continue;
      const Weight higher = bound | (Weight)1 << bit;
      Weight sum = 0;
      members([&](Weight k, Weight w) { sum += k < higher ? 0 : by_count ? 1 : w; });
      if (reduced(sum, Sum{}, turn) > x) bound = higher;
    }
    Weight sum = 0;
    members([&](Weight k, Weight w) { sum += k < bound ? 0 : w; });
    return {(int)~(unsigned)bound, t.mass_before + reduced(sum, Sum{}, turn)};
  }

  // A token of a row whose largest logit is `most`. The block calls it together.
  __device__ int draw(int row, float most) const {
    const DecodeCall& c = a.call;
    const int count = (int)a.plan.head.n, stretch = ((count - 1) / kBuckets / kWarp + 1) * kWarp;
    const bool cuts = c.top_k > 0 && c.top_k < count;
    const Scores s{(const T*)c.logits + (int64_t)row * count, most, (float)c.temperature, count, stretch, cuts || c.top_p < 1};
    int turn = 0;
    fill(s);
    Weight all = 0, tokens = 0;
    for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) all += table().mass[i], tokens += table().count[i];
    Weight kept = reduced(all, Sum{}, turn);
    tokens = reduced(tokens, Sum{}, turn);
    Found found{};
#pragma unroll 1
    for (int search = 0; search < 3; ++search) {  // the end of the top k, the end of the top p, the draw
      Weight x;
      if (search == 0) {
        if (!cuts || (Weight)c.top_k >= tokens) continue;
        x = c.top_k - 1;
      } else if (search == 1) {
        const Weight held = (Weight)ceil(c.top_p * (double)kept);  // a token stays if those before it hold less
        if (c.top_p >= 1 || held >= kept) continue;
        x = held - 1;
      } else {
        x = (Weight)(((const double*)c.uniform)[row] * (double)kept);
        if (x >= kept) x = kept - 1;
      }
      found = find(s, search == 0, x, turn);
      kept = found.through;
    }
    return found.token;
  }
};

}  // namespace
}  // namespace pyfused
