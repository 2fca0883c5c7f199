// How do threads share one product, or several in order? In one parallel region.
//
// Of many rows each thread takes some for its own, a block at a time through all products: what one writes the next finds in L2. Of
// fewer rows each thread takes some of the outputs. If x is small every thread packs it for itself. Otherwise they pack it together,
// and a barrier follows.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "gemm.h"
#include "parallel.h"

namespace pyfused::PYFUSED_ISA {

constexpr int64_t kPackedAlone = 1 << 14;  // floats that every thread packs for itself: 2 us, and a barrier takes 1 or more

// Runs products of the same rows, in order, in one parallel region. Each product sees the results of the one before.
template <class... P> void run_in_order(P&... products) {
  int threads = 1;
  int64_t rows = 0, block = INT64_MAX, least = 0, packed = 0, scratch = 0;
  auto most = [](auto& value, auto other) { value = other > value ? other : value; };
  ((most(threads, threads_for(products.run_items(), products.run_work())), rows = products.row_count(),
    block = P::kBlockM < block ? P::kBlockM : block, most(least, P::kShareM)), ...);
  const bool by_rows = rows >= block && rows >= least * threads;
  auto measure = [&](const auto& p) { most(packed, p.packed_size()), most(scratch, p.scratch_size()); };
  (measure(by_rows ? products.of_rows(0, block) : products), ...);
  packed = (packed + 15) / 16 * 16;
  scratch = (scratch + 15) / 16 * 16;

  // All products use the same memory. Each share has its own for what it packs alone.
  const bool alone = by_rows || packed <= kPackedAlone;
  const int64_t each = (alone ? packed : 0) + scratch;
  void* memory = std::malloc(((alone ? 0 : packed) + threads * each) * sizeof(float) + 64);
  float* base = (float*)(((std::uintptr_t)memory + 63) / 64 * 64);
  auto run_alone = [&](auto part, int share, int64_t begin, int64_t end) {
    part.use(base + share * each, base + share * each + packed);
    part.pack(0, part.pack_items());
    part.run(0, begin, end);
  };
  if (by_rows) {
    parallel_chunks(threads, (rows + kPanel - 1) / kPanel, [&](int share, int64_t begin, int64_t end) {
      const int64_t panels = end - begin, blocks = (panels * kPanel + block - 1) / block;
      for (int64_t b = 0; b < blocks; ++b) {  // as even as they come: a rest of few rows would be summed in another order
        const int64_t i = (begin + panels * b / blocks) * kPanel, after = (begin + panels * (b + 1) / blocks) * kPanel;
        auto one = [&](const auto& part) { run_alone(part, share, 0, part.run_items()); };
        (one(products.of_rows(i, (after < rows ? after : rows) - i)), ...);
      }
    });
  } else {
    if (!alone) (products.use(base, base + packed), ...);
    const int steps = alone ? 1 : 2;  // to pack may be a phase of its own
    parallel_phases(threads, steps * (int)sizeof...(P), [&](int phase, int share) {
      auto one = [&](const auto& p) {
        const bool packs = phase % steps < steps - 1;
        const int64_t items = packs ? p.pack_items() : p.run_items();
        const int64_t begin = items * share / threads, end = items * (share + 1) / threads;
        if (alone) run_alone(p, share, begin, end);
        else packs ? p.pack(begin, end) : p.run(share, begin, end);
      };
      int turn = 0;
      ((turn++ == phase / steps ? one(products) : void()), ...);
    });
  }
  std::free(memory);
}

}  // namespace pyfused::PYFUSED_ISA
