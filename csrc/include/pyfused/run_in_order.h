// How do threads share one product, or several in order? In one parallel region.
//
// Of many rows each thread takes some for its own, a block at a time through all products: what one gives the next finds in L2. Of
// fewer rows each thread takes some of the outputs. If x is small every thread packs it for itself. Otherwise they pack it together,
// and a barrier follows.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "gemm.h"
#include "parallel.h"

namespace pyfused::PYFUSED_ISA {

constexpr int64_t kPackedAlone = 1 << 14;  // floats that every thread packs for itself: 2 us, and a barrier takes 1 or more

// How threads share products of the same rows.
struct Split {
  int threads = 1;
  int64_t rows = 0, block = INT64_MAX, least = 0;  // block: most rows of one; least: fewest for a thread

  template <class... P> explicit Split(const P&... products) { (add(products), ...); }
  template <class P> void add(const P& p) {
    rows = p.row_count();
    const int64_t outputs = p.run_items(), shares = rows / P::kShareM, items = shares > outputs ? shares : outputs;
    const int wanted = threads_for(items, items ? outputs * p.run_work() / items : 0);
    threads = wanted > threads ? wanted : threads;
    block = P::kBlockM < block ? P::kBlockM : block;
    least = P::kShareM > least ? P::kShareM : least;
  }
  bool by_rows() const { return rows >= block && rows >= least * threads; }

  // body(share, i, count) for blocks of rows, as even as they come: a rest of few rows would be summed in another order.
  template <class Body> void each_block(const Body& body) const {
    parallel_chunks(threads, (rows + kPanel - 1) / kPanel, [&](int share, int64_t begin, int64_t end) {
      const int64_t panels = end - begin, blocks = (panels * kPanel + block - 1) / block;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t i = (begin + panels * b / blocks) * kPanel, after = (begin + panels * (b + 1) / blocks) * kPanel;
        body(share, i, (after < rows ? after : rows) - i);
      }
    });
  }
};

// Floats for all shares, each share's in whole cache lines.
class Memory {
  void* all;

 public:
  explicit Memory(int64_t floats) : all(std::malloc(floats * sizeof(float) + 64)) {}
  ~Memory() { std::free(all); }
  Memory(const Memory&) = delete;
  float* begin() const { return (float*)(((std::uintptr_t)all + 63) / 64 * 64); }
  static int64_t whole(int64_t floats) { return (floats + 15) / 16 * 16; }
};

// Runs products of the same rows, in order, in one parallel region. Each product sees the results of the one before.
template <class... P> void run_in_order(P&... products) {
  const Split split(products...);
  const int threads = split.threads;
  int64_t packed = 0, scratch = 0;
  auto measure = [&](const auto& p) {
    packed = Memory::whole(p.packed_size()) > packed ? Memory::whole(p.packed_size()) : packed;
    scratch = Memory::whole(p.scratch_size()) > scratch ? Memory::whole(p.scratch_size()) : scratch;
  };
  (measure(split.by_rows() ? products.of_rows(0, split.block) : products), ...);

  // All products use the same memory. Each share has its own for what it packs alone.
  const bool alone = split.by_rows() || packed <= kPackedAlone;
  const int64_t each = (alone ? packed : 0) + scratch;
  const Memory memory((alone ? 0 : packed) + threads * each);
  float* base = memory.begin();
  auto run_alone = [&](auto part, int share, int64_t begin, int64_t end) {
    part.use(base + share * each, base + share * each + packed);
    part.pack(0, part.pack_items());
    part.run(0, begin, end);
  };
  if (split.by_rows()) {
    split.each_block([&](int share, int64_t i, int64_t count) {
      auto one = [&](const auto& part) { run_alone(part, share, 0, part.run_items()); };
      (one(products.of_rows(i, count)), ...);
    });
    return;
  }
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

// Runs a network of two products: `second` multiplies what `first` gives, and nobody else reads that. Both lack that pointer. Of
// many rows it never is in memory as a whole.
template <class First, class Second> void run_network(First& first, Second& second) {
  const Split split(first, second);
  if (split.by_rows() && First::kOfElements && Second::kOfElements && !first.keeps()) {
    const auto in = first.of_rows(0, split.block);
    const auto out = second.of_rows(0, split.block);
    const int64_t of_in = Memory::whole(in.packed_size()), of_out = Memory::whole(out.packed_size());
    const int64_t scratch = in.scratch_size() > out.scratch_size() ? in.scratch_size() : out.scratch_size();
    const int64_t each = of_in + of_out + Memory::whole(scratch);
    const Memory memory(split.threads * each);
    split.each_block([&](int share, int64_t i, int64_t count) {
      float* own = memory.begin() + share * each;
      auto from = first.of_rows(i, count);
      auto to = second.of_rows(i, count);
      from.use(own, own + of_in + of_out);
      to.use(own + of_in, own + of_in + of_out);
      from.pack(0, from.pack_items());
      from.run_into(to.packed);
      to.run(0, 0, to.run_items());
    });
    return;
  }
  using Between = typename Second::Input;
  const Memory memory((split.rows * second.k * sizeof(Between) + sizeof(float) - 1) / sizeof(float));
  first.give((Between*)memory.begin());
  second.x = (const Between*)memory.begin();
  run_in_order(first, second);
}

}  // namespace pyfused::PYFUSED_ISA
