// How is work spread over threads? A static split over torch's own OpenMP pool; small work stays on the calling thread.
#pragma once

#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pyfused::PYFUSED_ISA {

// Opening a parallel region costs about 14 us on two cores. One core does some 3e5 simple float operations in that time.
constexpr int64_t kWorkPerThread = 1 << 18;

// Threads for `items` pieces of `work` float operations each; never more than torch.set_num_threads allows.
inline int threads_for(int64_t items, int64_t work) {
#if defined(_OPENMP)
  if (omp_in_parallel()) return 1;
  int64_t n = omp_get_max_threads(), by_work = 1 + items * work / kWorkPerThread;
  n = n < by_work ? n : by_work;
  n = n < items ? n : items;
  return n < 1 ? 1 : static_cast<int>(n);
#else
  (void)items, (void)work;
  return 1;
#endif
}

// Calls body(thread, begin, end) on `threads` contiguous shares of [0, items). The split depends only on the arguments,
// so sums combined in thread order are repeatable for a given thread count.
template <class Body> inline void parallel_chunks(int threads, int64_t items, const Body& body) {
  if (threads <= 1) {
    body(0, int64_t{0}, items);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    // The runtime may grant fewer threads than asked for; then a thread runs several shares.
    for (int share = omp_get_thread_num(); share < threads; share += omp_get_num_threads())
      body(share, items * share / threads, items * (share + 1) / threads);
  }
#endif
}

// Calls body(phase, share) for every share of phase 0, then for every share of phase 1, and so on. One region has a
// barrier between phases. A barrier costs about 1 us, a new region 14.
template <class Body> inline void parallel_phases(int threads, int phases, const Body& body) {
  if (threads <= 1) {
    for (int phase = 0; phase < phases; ++phase) body(phase, 0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  for (int phase = 0; phase < phases; ++phase) {
    for (int share = omp_get_thread_num(); share < threads; share += omp_get_num_threads()) body(phase, share);
#pragma omp barrier
  }
#endif
}

// The first item of a share. Items of unequal cost are split in order into `threads` shares of about equal cost.
template <class Cost> inline int64_t share_begin(int64_t share, int threads, int64_t items, const Cost& cost) {
  if (share <= 0) return 0;
  if (share >= threads) return items;
  int64_t total = 0, item = 0, sum = 0;
  for (int64_t i = 0; i < items; ++i) total += cost(i);
  while (item < items && sum < total / threads * share) sum += cost(item++);
  return item;
}

}  // namespace pyfused::PYFUSED_ISA
