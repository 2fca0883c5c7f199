// Launches decode on CUDA: one token per row through a whole decoder (decode_kernel.cuh), and draws it (decode_draw.cuh).
#include "kernels.h"

#include "decode_draw.cuh"
#include "decode_kernel.cuh"

namespace pyfused::cuda {
namespace {

using Kernel = void(DecodeArguments);

template <class T, Form FORM> Kernel* kernel_of_rows(int64_t rows) {
  if (rows == 1) return decode_kernel<T, 1, FORM>;
  if (rows == 2) return decode_kernel<T, 2, FORM>;
  return rows <= 4 ? decode_kernel<T, 4, FORM> : decode_kernel<T, 8, FORM>;
}
template <class T> Kernel* kernel_of(int64_t rows, Form form) {
  if constexpr (sizeof(T) == 2) {
    if (form == Form::kRows) return kernel_of_rows<T, Form::kRows>(rows);
    if (form == Form::kColumns) return kernel_of_rows<T, Form::kColumns>(rows);
  }
  return kernel_of_rows<T, Form::kAny>(rows);
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
  addr at = scratch;
  const auto take = [&](int64_t count) {
    const addr from = at;
    at += up(count * 4, 256) * 256;
    return (float*)from;
  };
  a.barrier = (unsigned*)take(1);
  a.top = take(blocks * c.rows), a.winner = (int*)take(blocks * c.rows);
  const addr layer = at;
  const int64_t branch = c.rows * padded_row(p.hidden) * (by_columns ? kMostParts : 1), inner = p.heads * p.head_size;
  const auto product = [&](Phase phase, int64_t count) { a.result[(int)phase] = take(count); };
  const auto attention = [&](bool cross, int64_t chunks) {
    const int64_t parts = c.rows * p.heads * chunks;
    a.part[cross] = take(parts * padded_row(p.head_size)), a.part_state[cross] = take(parts * 4);
  };
  product(Phase::kQueryKeyValue, c.rows * padded_row(inner + 2 * p.kv_heads * p.head_size));
  attention(false, a.chunks);
  product(Phase::kOutput, branch);
  if (c.sources) {
    product(Phase::kCrossQuery, c.rows * padded_row(inner));
    attention(true, a.cross_chunks);
    product(Phase::kCrossOutput, branch);
  }
  product(Phase::kUp, c.rows * padded_row(p.intermediate));
  product(Phase::kDown, branch);
  a.layer_bytes = (int64_t)(at - layer);
  return (int64_t)(layer - scratch) + larger(p.layers, 1) * a.layer_bytes;
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
    auto kernel = kernel_of<T>(c.rows, Form::kAny);  // all forms have one block on a multiprocessor
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

void decode_forward(addr plan, addr call, addr scratch, int blocks, int threads, bool by_columns, bool wide, int form,
                    int dtype, int device, addr stream) {
  DecodeArguments a{*(const DecodePlan*)plan, *(const DecodeCall*)call};
  const DecodePlan& p = a.plan;
  const DecodeCall& c = a.call;
  if (is_empty(p, c)) return;
  const Launch launch{"decode", c.rows, p.hidden, device};
  const OnDevice guard(launch);
  const int element = dtype == 0 ? 4 : 2;
  const int64_t scratch_bytes = divide(p, c, scratch, blocks, by_columns, a);
  for (int64_t i = 0; i < 2 * p.layers; ++i) {
    a.address[i] = ((const addr*)c.caches)[i];
    if (c.cross_caches) a.address[2 * p.layers + i] = ((const addr*)c.cross_caches)[i];
  }
  a.pitch = (int)(up(larger(larger(p.hidden, p.heads * p.head_size), p.intermediate), kPitchUnit) * kPitchUnit);
  a.by_columns = by_columns, a.wide_weights = wide, a.wide_keys = wide_keys(p, c, a, element);
  const bool is_plain = a.wide_keys && p.heads == p.kv_heads && (!c.sources || c.rows == c.sources);
  const size_t bytes = shared_bytes(p, c, threads, by_columns, element);
  launch.check(cudaMemsetAsync((void*)scratch, kAbsentByte, scratch_bytes, (cudaStream_t)stream));
  PYFUSED_BY_DTYPE(dtype, {
    auto kernel = kernel_of<T>(c.rows, is_plain ? (Form)form : Form::kAny);
    allow_shared(launch, kernel, bytes);
    PYFUSED_LAUNCH_COOPERATIVE(kernel, blocks, threads, bytes, stream, a);
    if (c.chosen && c.uniform) {
      launch.check();
      PYFUSED_LAUNCH(draw_kernel<T>, c.rows, kDrawThreads, kDrawBytes, stream, c, (int)p.head.n);
    }
  })
  launch.check();
}

}  // namespace pyfused::cuda
