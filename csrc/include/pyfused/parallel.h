// How is work spread over threads? A static split over torch's own OpenMP pool; small work stays on the calling thread.
//
// On Linux torch uses libgomp, and so does code of gcc. clang's code uses libomp, which would be a second pool:
// torch.set_num_threads would not govern it. With PYFUSED_LIBGOMP the calls that gcc makes are written out, for any compiler.
#pragma once

#include <cstdint>
#if defined(PYFUSED_LIBGOMP)
extern "C" {
int omp_in_parallel(void);
int omp_get_max_threads(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
void GOMP_parallel(void (*body)(void*), void* argument, unsigned threads, unsigned flags);
void GOMP_barrier(void);
}
#elif defined(_OPENMP)
#include <omp.h>
#endif
#if defined(PYFUSED_LIBGOMP) || defined(_OPENMP)
#define PYFUSED_THREADS
#endif

namespace pyfused::PYFUSED_ISA {

// Opening a parallel region costs about 14 us on two cores. One core does some 3e5 simple float operations in that time.
constexpr int64_t kWorkPerThread = 1 << 18;

// Threads for `items` pieces of `work` float operations each; never more than torch.set_num_threads allows.
inline int threads_for(int64_t items, int64_t work) {
#if defined(PYFUSED_THREADS)
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

#if defined(PYFUSED_THREADS)
// Calls body() on each of at most `threads` threads.
template <class Body> inline void in_parallel(int threads, const Body& body) {
#if defined(PYFUSED_LIBGOMP)
  GOMP_parallel([](void* argument) { (*static_cast<const Body*>(argument))(); }, const_cast<Body*>(&body), threads, 0);
#else
#pragma omp parallel num_threads(threads)
  body();
#endif
}

// Waits inside body() for the other threads.
inline void barrier() {
#if defined(PYFUSED_LIBGOMP)
  GOMP_barrier();
#else
#pragma omp barrier
#endif
}
#endif

// Calls body(thread, begin, end) on `threads` contiguous shares of [0, items). The split depends only on the arguments,
// so sums combined in thread order are repeatable for a given thread count.
template <class Body> inline void parallel_chunks(int threads, int64_t items, const Body& body) {
  if (threads <= 1) {
    body(0, int64_t{0}, items);
    return;
  }
#if defined(PYFUSED_THREADS)
  in_parallel(threads, [&] {
    // The runtime may grant fewer threads than asked for; then a thread runs several shares.
    for (int share = omp_get_thread_num(); share < threads; share += omp_get_num_threads())
      body(share, items * share / threads, items * (share + 1) / threads);
  });
#endif
}

// Calls body(phase, share) for every share of phase 0, then for every share of phase 1, and so on. One region has a
// barrier between phases. A barrier costs about 1 us, a new region 14.
template <class Body> inline void parallel_phases(int threads, int phases, const Body& body) {
  if (threads <= 1) {
    for (int phase = 0; phase < phases; ++phase) body(phase, 0);
    return;
  }
#if defined(PYFUSED_THREADS)
  in_parallel(threads, [&] {
    for (int phase = 0; phase < phases; ++phase) {
      for (int share = omp_get_thread_num(); share < threads; share += omp_get_num_threads()) body(phase, share);
      if (phase + 1 < phases) barrier();  // the region's end is one
    }
  });
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
