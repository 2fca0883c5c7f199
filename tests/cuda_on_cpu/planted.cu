// Does the shim do what CUDA says, and does it find what is wrong? Small kernels, right and wrong ones, called by
// test_shim.py.
#include "planted.h"

#include "pyfused/cooperative.cuh"
#include "pyfused/launch.h"
#include "pyfused/tensor_core.cuh"

namespace planted {

using namespace pyfused;

static void checked() { Launch{"planted", 0, 0, 0}.check(); }

// ---- barriers: out[block] = the sum of the block's 256 numbers --------------------------------------------------------
enum Flaw { kNone, kMissing, kDivergent, kReturned, kOtherLine };

template <int FLAW> static __global__ void tree_sum(const float* x, float* out) {
  __shared__ float part[256];
  const int t = threadIdx.x;
  if (FLAW == kReturned && t == 77) return;
  part[t] = x[blockIdx.x * 256 + t];
  if (FLAW == kDivergent) {
    if (t < 100) __syncthreads();
  } else if (FLAW == kOtherLine) {
    if (t < 100) __syncthreads();
    else __syncthreads();
  } else {
    __syncthreads();
  }
  for (int half = 128; half > 0; half /= 2) {
    if (t < half) part[t] += part[t + half];
    if (FLAW != kMissing) __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = part[0];
}

void sum(addr x, addr out, int blocks, int flaw) {
  const float* in = (const float*)x;
  float* to = (float*)out;
  if (flaw == kNone) PYFUSED_LAUNCH(tree_sum<kNone>, blocks, 256, 0, 0, in, to);
  else if (flaw == kMissing) PYFUSED_LAUNCH(tree_sum<kMissing>, blocks, 256, 0, 0, in, to);
  else if (flaw == kDivergent) PYFUSED_LAUNCH(tree_sum<kDivergent>, blocks, 256, 0, 0, in, to);
  else if (flaw == kReturned) PYFUSED_LAUNCH(tree_sum<kReturned>, blocks, 256, 0, 0, in, to);
  else PYFUSED_LAUNCH(tree_sum<kOtherLine>, blocks, 256, 0, 0, in, to);
  checked();
}

// Writes within a warp and reads by another lane: right only with __syncwarp between.
template <bool SYNC> static __global__ void neighbours(const float* x, float* out) {
  __shared__ float row[64];
  row[threadIdx.x] = x[threadIdx.x];
  if (SYNC) __syncwarp();
  out[threadIdx.x] = row[threadIdx.x ^ 1];
}
void exchange(addr x, addr out, bool sync) {
  if (sync) PYFUSED_LAUNCH(neighbours<true>, 1, 64, 0, 0, (const float*)x, (float*)out);
  else PYFUSED_LAUNCH(neighbours<false>, 1, 64, 0, 0, (const float*)x, (float*)out);
  checked();
}

// ---- memory: `beyond` elements past the end of an array of 64 ----------------------------------------------------------
static __global__ void overrun(const float* x, float* out, int which, int beyond) {
  __shared__ float fixed[64];
  PYFUSED_SHARED_BYTES(bytes);
  float* dynamic = (float*)bytes;
  const int t = threadIdx.x;
  fixed[t] = dynamic[t] = x[t];
  __syncthreads();
  out[t] = which == 0 ? x[t + beyond] : which == 1 ? fixed[t + beyond] : dynamic[t + beyond];
}
void read_beyond(addr x, addr out, int which, int beyond) {
  PYFUSED_LAUNCH(overrun, 1, 64, 64 * sizeof(float), 0, (const float*)x, (float*)out, which, beyond);
  checked();
}

// Reads shared memory that nobody wrote.
static __global__ void unwritten(float* out) {
  __shared__ float fixed[32];
  PYFUSED_SHARED_BYTES(bytes);
  out[threadIdx.x] = threadIdx.x % 2 ? fixed[threadIdx.x] : ((float*)bytes)[threadIdx.x];
  fixed[threadIdx.x] = ((float*)bytes)[threadIdx.x] = 1.0f;
}
void read_unwritten(addr out) {
  PYFUSED_LAUNCH(unwritten, 2, 32, 128, 0, (float*)out);
  checked();
}

static __global__ void nothing() {}
void launch_nothing(unsigned grid_x, unsigned grid_y, unsigned threads, size_t shared, bool ask) {
  if (ask) allow_shared(Launch{"planted", 0, 0, 0}, nothing, shared);
  PYFUSED_LAUNCH(nothing, dim3(grid_x, grid_y), threads, shared, 0);
  checked();
}

// ---- warp operations: eight results for every lane ----------------------------------------------------------------------
static __global__ void shuffles(const float* x, float* out) {
  const int l = threadIdx.x;
  const float v = x[l];
  float* row = out + 8 * l;
  row[0] = __shfl_sync(kAllLanes, v, 5);
  row[1] = __shfl_xor_sync(kAllLanes, v, 12);
  row[2] = __shfl_down_sync(kAllLanes, v, 3);
  row[3] = __shfl_up_sync(kAllLanes, v, 3);
  row[4] = __shfl_sync(kAllLanes, v, l + 1, 8);
  row[5] = (float)__popc(__ballot_sync(kAllLanes, v > 0.0f));
  row[6] = (float)(__any_sync(kAllLanes, l == 7) + 2 * __all_sync(kAllLanes, l == 7));
  const unsigned own = l < 16 ? 0x0000ffffu : 0xffff0000u;  // two halves, each with its own mask and line
  if (l < 16) row[7] = __shfl_xor_sync(own, v, 1);
  else row[7] = __shfl_xor_sync(own, v, 2);
}
void shuffle(addr x, addr out) {
  PYFUSED_LAUNCH(shuffles, 1, 32, 0, 0, (const float*)x, (float*)out);
  checked();
}

// flaw 0: half of the warp does not come; 1: half of it comes to another line; 2: a lane outside the mask is read.
static __global__ void broken_shuffles(float* out, int flaw) {
  const int l = threadIdx.x;
  float v = (float)l;
  if (flaw == 0) {
    if (l < 16) v = __shfl_xor_sync(kAllLanes, v, 1);
  } else if (flaw == 1) {
    if (l < 16) v = __shfl_xor_sync(kAllLanes, v, 1);
    else v = __shfl_xor_sync(kAllLanes, v, 2);
  } else if (l < 16) {
    v = __shfl_sync(0xffffu, v, 20);
  }
  out[l] = v;
}
void break_shuffle(addr out, int flaw) {
  PYFUSED_LAUNCH(broken_shuffles, 1, 32, 0, 0, (float*)out, flaw);
  checked();
}

// ---- tensor cores: c (16, 8) = a (16, 16) b, b stored as (8, 16) or, transposed, as (16, 8) -----------------------------
template <class T, bool TRANSPOSED, bool WAIT> static __global__ void product(const T* a, const T* b, float* c) {
  PYFUSED_SHARED_BYTES(bytes);
  T* tile_a = (T*)bytes;
  T* tile_b = tile_a + 16 * 16;
  const int l = threadIdx.x;
  cp_async16(tile_a + 8 * l, a + 8 * l, true);
  cp_async_commit();
  cp_async16(tile_b + 8 * (l % 16), b + 8 * (l % 16), true);
  cp_async_commit();
  if (WAIT) cp_async_wait<0>();
  else cp_async_wait<1>();
  __syncwarp();
  uint32_t x[4], y[4];
  ldmatrix_x4(x, tile_a + (l % 16) * 16 + l / 16 * 8);
  if (TRANSPOSED) ldmatrix_x4_trans(y, tile_b + (l % 16) * 8);
  else ldmatrix_x4(y, tile_b + (l % 8) * 16 + l / 8 % 2 * 8);
  float d[4] = {};
  mma_m16n8k16<T>(d, x, y[0], y[1]);
  for (int r = 0; r < 4; ++r) c[(l / 4 + r / 2 * 8) * 8 + l % 4 * 2 + r % 2] = d[r];
}
template <class T> void multiply(addr a, addr b, addr c, bool transposed, bool wait) {
  if (transposed) PYFUSED_LAUNCH((product<T, true, true>), 1, 32, 768, 0, (const T*)a, (const T*)b, (float*)c);
  else if (wait) PYFUSED_LAUNCH((product<T, false, true>), 1, 32, 768, 0, (const T*)a, (const T*)b, (float*)c);
  else PYFUSED_LAUNCH((product<T, false, false>), 1, 32, 768, 0, (const T*)a, (const T*)b, (float*)c);
  checked();
}

// ---- grid barrier and atomics -------------------------------------------------------------------------------------------
// Each block adds its number to what the block behind it sends; the last begins, unless `begins` is false.
static __global__ void relayed(float* sums, bool begins) {
  const int block = blockIdx.x, last = gridDim.x - 1;
  Pack<float, 1> found[1] = {};
  if (block < last) receive(found, [&](int) { return sums + block + 1; }, [](int) { return 1; });
  __syncthreads();
  if (threadIdx.x == 0 && (begins || block < last)) send(sums + block, found[0].at[0] + block);
}
void relay(addr sums, int blocks, bool begins, bool cooperative) {
  float* s = (float*)sums;
  if (cooperative) PYFUSED_LAUNCH_COOPERATIVE(relayed, blocks, 64, 0, 0, s, begins);
  else PYFUSED_LAUNCH(relayed, blocks, 64, 0, 0, s, begins);
  checked();
}

// Every block adds to one counter; after the barrier, every block must see all of it.
template <bool BARRIER> static __global__ void counted(int* counter, int* seen) {
  __shared__ int mine;
  if (threadIdx.x == 0) mine = (int)blockIdx.x + 1;
  __syncthreads();
  atomicAdd(counter, mine);
  if (BARRIER) cuda_on_cpu::grid_barrier({"grid barrier", __FILE__, __LINE__});
  if (threadIdx.x == 0) seen[blockIdx.x] = *counter + 1000 * mine;
}
void count(addr counter, addr seen, int blocks, bool barrier, bool cooperative) {
  int *c = (int*)counter, *s = (int*)seen;
  if (!barrier) PYFUSED_LAUNCH_COOPERATIVE(counted<false>, blocks, 64, 0, 0, c, s);
  else if (cooperative) PYFUSED_LAUNCH_COOPERATIVE(counted<true>, blocks, 64, 0, 0, c, s);
  else PYFUSED_LAUNCH(counted<true>, blocks, 64, 0, 0, c, s);
  checked();
}

// ---- conversions ----------------------------------------------------------------------------------------------------------
template <class T> static __global__ void convert(const float* x, T* narrow_out, float* wide_out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  narrow_out[i] = narrow<T>(x[i]);
  wide_out[i] = widen(narrow_out[i]);
}
template <class T> void round_trip(addr x, addr narrow_out, addr wide_out, int n) {
  PYFUSED_LAUNCH(convert<T>, (unsigned)up(n, 128), 128, 0, 0, (const float*)x, (T*)narrow_out, (float*)wide_out, n);
  checked();
}

template void multiply<__half>(addr, addr, addr, bool, bool);
template void multiply<__nv_bfloat16>(addr, addr, addr, bool, bool);
template void round_trip<__half>(addr, addr, addr, int);
template void round_trip<__nv_bfloat16>(addr, addr, addr, int);

}  // namespace planted
