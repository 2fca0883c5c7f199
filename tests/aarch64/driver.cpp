// How do the kernels of csrc/cpu run in another process? This program reads calls from its standard input, makes them, and
// writes what each left in memory. emulated.py compiles it for aarch64, runs it in qemu, and writes the calls.
//
// A call is a row of 8-byte words and the memory it uses:
//   number of the kernel, threads, and how many memories, arguments and pointers follow; the size of each memory; their bytes;
//   for each argument a pair: (number of a memory, offset) is an address in it, (-1, value) a number, or the bits of a double;
//   for each pointer four words: memory and offset of the pointer, then memory and offset of what it points to.
// The answer: the kernel's result, 0 for void, and the bytes of every memory.
#include <omp.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "pyfused/simd.h"

namespace pyfused::PYFUSED_ISA {

// ---- what csrc/cpu/kernels.h does not offer yet ---------------------------------------------------------------------

// y = x in another dtype, through the loads and stores of simd.h. At least one of the two is float32.
void convert(addr x, addr y, int64_t count, int from, int to) {
  PYFUSED_BY_DTYPE(from, {
    const T* source = (const T*)x;
    auto run = [&](auto* target) {
      int64_t i = 0;
      for (; i + kWidth <= count; i += kWidth) store(target + i, load(source + i));
      if (i < count) store_partial(target + i, load_partial(source + i, count - i), count - i);
    };
    PYFUSED_BY_DTYPE(to, run((T*)y);)
  })
}
void widen_int8(addr x, addr y, int64_t count) {
  for (int64_t i = 0; i + kWidth <= count; i += kWidth) store((float*)y + i, load((const int8_t*)x + i));
}

}  // namespace pyfused::PYFUSED_ISA

namespace {

// ---- a kernel as a function of words --------------------------------------------------------------------------------

template <class T> T argument(int64_t word) {
  if constexpr (std::is_floating_point_v<T>) {
    T value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
  } else {
    return static_cast<T>(word);
  }
}

template <auto kernel> struct Call;
template <class Result, class... Arguments, Result (*kernel)(Arguments...)> struct Call<kernel> {
  static int64_t run(const int64_t* words) { return run(words, std::index_sequence_for<Arguments...>()); }
  template <std::size_t... i> static int64_t run(const int64_t* words, std::index_sequence<i...>) {
    if constexpr (std::is_void_v<Result>) return kernel(argument<Arguments>(words[i])...), 0;
    else return kernel(argument<Arguments>(words[i])...);
  }
};

#define KERNEL(name) &Call<&pyfused::PYFUSED_ISA::name>::run
int64_t (*const kernels[])(const int64_t*) = {
#include "kernel_list.h"  // KERNEL(name), for each kernel of kernels.h and of this file, by emulated.py
};

// ---- memory ---------------------------------------------------------------------------------------------------------

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "aarch64 driver: %s\n", what);
  std::exit(1);
}

void read(void* to, std::size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) fail("a call ends too early");
}

// A tensor's memory between two strips that no kernel may write to.
class Memory {
 public:
  explicit Memory(int64_t size) : size_(size), base_((char*)std::aligned_alloc(64, (size + 2 * kStrip + 63) / 64 * 64)) {
    std::memset(base_, kMark, kStrip);
    std::memset(bytes() + size, kMark, kStrip);
  }
  char* bytes() const { return base_ + kStrip; }
  int64_t size() const { return size_; }
  bool intact() const {
    for (int64_t i = 0; i < kStrip; ++i)
      if (base_[i] != kMark || bytes()[size_ + i] != kMark) return false;
    return true;
  }
  void release() { std::free(base_); }

 private:
  static constexpr int64_t kStrip = 256;
  static constexpr char kMark = 0x5a;
  int64_t size_;
  char* base_;
};

}  // namespace

int main() {
  for (int64_t head[5]; std::fread(head, sizeof(head), 1, stdin) == 1;) {
    const auto [kernel, threads, memories, count, pointers] = head;
    std::vector<int64_t> sizes(memories), pairs(2 * count), words(count), links(4 * pointers);
    read(sizes.data(), 8 * memories);
    std::vector<Memory> memory;
    for (int64_t size : sizes) {
      memory.emplace_back(size);
      read(memory.back().bytes(), size);
    }
    read(pairs.data(), 16 * count);
    read(links.data(), 32 * pointers);
    for (int64_t* link = links.data(); link < links.data() + links.size(); link += 4) {
      const char* target = memory[link[2]].bytes() + link[3];
      std::memcpy(memory[link[0]].bytes() + link[1], &target, sizeof(target));
    }
    for (int64_t i = 0; i < count; ++i)
      words[i] = pairs[2 * i] < 0 ? pairs[2 * i + 1] : (int64_t)memory[pairs[2 * i]].bytes() + pairs[2 * i + 1];
    omp_set_num_threads((int)threads);
    const int64_t result = kernels[kernel](words.data());
    std::fwrite(&result, sizeof(result), 1, stdout);
    for (Memory& m : memory) {
      if (!m.intact()) fail("a kernel wrote outside of a tensor");
      std::fwrite(m.bytes(), 1, m.size(), stdout);
      m.release();
    }
    std::fflush(stdout);
  }
}
