// How does decode draw a token of a row, with a temperature from the top k, the top p, or all? kernels/shared/draw.py has the same
// in plain PyTorch, for the same numbers in [0, 1).
//
// A block draws for a row. Tokens have an order: by falling score, then by index; or by index alone if nothing is cut. A
// token's weight is e^score as an integer in units of 2^-44, so no sum depends on its order: the token is the same with any
// number of blocks. Weights of 0 are left out: less than 2^-45 of the likeliest token's probability each.
//
// The end of the top k, the end of the top p, and the draw are the same search: which token has a sum before it of at most x,
// and with it of more? First among kBuckets stretches of the order, whose sums one pass over the logits finds. Then among the
// tokens of one bucket, bit by bit of a key that is different for each. They lie in shared memory; too many are read again.
//
// Not yet measured; reckoned for 50,257 logits in bfloat16: a launch, a pass over them by one block (by index 7 us; by score 12,
// for the sums of 64 bits are compare-and-swap loops), and searches (by index 2 us; by score 7: 4 to list a bucket, 3 for the
// bits). As operators it is 15 to 20 launches, one of them a sort.
#pragma once

#include "decode_product.cuh"

namespace pyfused {

constexpr int kBuckets = 512;
constexpr float kLowest = -31.2f;  // a lower score has the weight 0

using Weight = unsigned long long;

namespace {

constexpr int kDrawThreads = 512;
constexpr int kDrawBytes = 40 << 10;  // of shared memory

template <class T> struct Draw {
  const DecodeCall& c;
  unsigned char* shared;  // kDrawBytes
  const int count;  // tokens
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;

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

  // What a draw keeps in shared memory.
  struct Table {
    Weight mass[kBuckets];
    unsigned count[kBuckets];
    Weight parts[2][kDrawThreads / kWarp];    // of reductions, by turns
    Weight mass_before, count_before;  // of the bucket that a search found
    unsigned bucket, listed;
  };
  __device__ Table& table() const { return *(Table*)shared; }
  __device__ Weight* keys() const { return (Weight*)(shared + (sizeof(Table) + 15) / 16 * 16); }  // then as many weights
  __device__ static int room() { return (kDrawBytes - (int)sizeof(Table) - 15) / 16; }

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
  __device__ int run(int row, float most) const {
    const int stretch = ((count - 1) / kBuckets / kWarp + 1) * kWarp;
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

// Replaces the likeliest token of each row, if its logit is finite, by one that is drawn. A kernel of its own: as a part of every
// decode kernel it would be a quarter of what nvcc compiles.
template <class T> __global__ void __launch_bounds__(kDrawThreads) draw_kernel(const DecodeCall call, int count) {
  PYFUSED_SHARED_BYTES(shared);
  const int row = blockIdx.x;
  int64_t* chosen = (int64_t*)call.chosen + row;
  const int64_t likeliest = *chosen;
  if (likeliest < 0) return;
  const float most = widen(((const T*)call.logits)[(int64_t)row * count + likeliest]);
  const int token = Draw<T>{call, shared, count}.run(row, most);
  if (threadIdx.x == 0) *chosen = token;
}

}  // namespace
}  // namespace pyfused
