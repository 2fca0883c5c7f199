// relative_bias on the CPU: bias[h][i][j] = table[bucket of j - i - offset][h], and the gradient of the table.
//
// Both move H Sq Sk elements and compute little. The forward copies rows of the bias from a row by distance. The backward
// adds gradients by distance, then by bucket. One thread owns a head, so the sums have a fixed order.
#include "relative_bias.h"

#include "pyfused/parallel.h"

namespace pyfused::PYFUSED_ISA {

void relative_bias_forward(addr table, addr buckets, addr out, int64_t heads, int64_t sq, int64_t sk, int64_t offset,
                           int64_t span, int64_t bucket_step, int64_t head_step, int dtype) {
  PYFUSED_BY_DTYPE(dtype, {
    ByDistance bias(buckets, span, heads, 1 - sq - offset, sk - 1 - offset, 1, kWidth);
    bias.fill((const T*)table, bucket_step, head_step);
    parallel_chunks(threads_for(heads * sq, sk), heads * sq, [&](int, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        T* to = (T*)out + n * sk;
        const int64_t head = n / sq, position = n % sq + offset;
        int64_t j = 0;
        for (; j + kWidth <= sk; j += kWidth) store(to + j, load(bias.at(head, j - position)));
        if (j < sk) store_partial(to + j, load(bias.at(head, j - position)), sk - j);
      }
    });
    std::free(bias.rows);
  })
}

// grad_out is dense (1, H, Sq, Sk). grad_table is float (num_buckets, H) and starts as zeros: some buckets have no distance.
void relative_bias_backward(addr grad_out, addr buckets, addr grad_table, int64_t heads, int64_t sq, int64_t sk,
                            int64_t offset, int64_t span, int dtype) {
  constexpr int64_t kRowsTogether = 64;  // long chains of additions lose bits
  PYFUSED_BY_DTYPE(dtype, {
    const ByDistance by(buckets, span, heads, 1 - sq - offset, sk - 1 - offset, 1, kWidth);
    parallel_chunks(threads_for(heads, sq * sk), heads, [&](int, int64_t begin, int64_t end) {
      float* sum = floats(by.length);
      double* total = (double*)floats(2 * by.length);
      for (int64_t head = begin; head < end; ++head) {
        for (int64_t i = 0; i < by.length; ++i) sum[i] = 0, total[i] = 0;
        for (int64_t i = 0; i < sq; ++i) {
          const T* from = (const T*)grad_out + (head * sq + i) * sk;
          for (int64_t j = 0; j < sk; j += kWidth) {
            float* to = sum + by.offset(j - i - offset);
            store(to, load(to) + (sk - j >= kWidth ? load(from + j) : load_partial(from + j, sk - j)));
          }
          if (i % kRowsTogether == kRowsTogether - 1 || i == sq - 1)
            for (int64_t k = 0; k < by.length; ++k) total[k] += sum[k], sum[k] = 0;
        }
        by.add_buckets(head, (float*)grad_table, [&](int64_t k) { return total[k]; });
      }
      std::free(sum), std::free(total);
    });
  })
}

}  // namespace pyfused::PYFUSED_ISA
