// What does a dense mask hold, and is a dense bias zero? Both are read at memory speed, up to the first element that decides.
// That is cheap enough for every call: B Sq Sk elements are few beside the B H Sq Sk scores.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace pyfused::PYFUSED_ISA {

namespace {

template <class T> struct Mask {
  const T* first;
  int64_t b, sq, sk, batch_stride, row_stride;

  const T* row(int64_t n, int64_t i) const { return first + n * batch_stride + i * row_stride; }
  const T* last(int64_t n) const { return row(n, sq - 1); }
};

// Whether two elements have the same value. Those of more than one byte are numbers, and -0.0 is 0.0: (1 - mask) * least makes
// it where a key is visible.
template <class T> bool same(T a, T b) {
  return a == b || (sizeof(T) > 1 && (T)((T)(a | b) << 1) == 0);
}

template <class T> bool equal(const T* a, const T* b, int64_t count) {
  if (a == b || std::memcmp(a, b, count * sizeof(T)) == 0) return true;
  if (sizeof(T) == 1) return false;
  for (int64_t j = 0; j < count; ++j)
    if (!same(a[j], b[j])) return false;
  return true;
}

template <class T> int64_t count_of(const T* row, int64_t count, T value) {
  int64_t found = 0;
  for (int64_t j = 0; j < count; ++j) found += same(row[j], value);
  return found;
}

// Whether row i of each entry equals the entry's last row up to key i + end - sq and hides all later keys.
template <class T> bool causal(const Mask<T>& m, int64_t end, const T* nothing) {
  for (int64_t n = 0; n < m.b; ++n)
    for (int64_t i = 0; i < m.sq; ++i) {
      const int64_t seen = i + 1 + end - m.sq;
      if (!equal(m.row(n, i), m.last(n), seen) || !equal(m.row(n, i) + seen, nothing, m.sk - seen)) return false;
    }
  return true;
}

// The first query may see `shortest` keys, the last one `end`.
template <class T> int64_t result(const Mask<T>& m, int64_t end, int64_t shortest, T visible, bool all_see, bool is_causal) {
  bool padding = false;
  for (int64_t n = 0; n < m.b; ++n) {
    if (all_see && count_of(m.last(n), shortest, visible) == 0) return -1;
    padding |= count_of(m.last(n), end, visible) != end;
  }
  return 2 * (is_causal ? end : 0) + padding;
}

template <class T> int64_t look(const Mask<T>& m, T visible, T hidden, bool all_see) {
  int64_t filled = 0;  // 1 + the last key that any query sees; the rest may be the free room of a static cache
  for (int64_t n = 0; n < m.b; ++n)
    for (int64_t j = 0; j < m.sk; ++j) {
      const T seen = m.last(n)[j];
      if (!same(seen, visible) && seen != hidden) return -1;
      if (seen != hidden && j >= filled) filled = j + 1;
    }
  bool alike = true;
  for (int64_t n = 0; alike && n < m.b; ++n)
    for (int64_t i = 0; alike && i < m.sq - 1; ++i) alike = equal(m.row(n, i), m.last(n), m.sk);
  if (alike) return result(m, m.sk, m.sk, visible, all_see, false);
  T* nothing = (T*)std::malloc(m.sk * sizeof(T));
  if (nothing == nullptr) return -1;
  for (int64_t j = 0; j < m.sk; ++j) nothing[j] = hidden;
  int64_t found = -1;
  const int64_t ends[] = {m.sk, filled};
  for (const int64_t end : ends)
    if (found < 0 && end >= m.sq && causal(m, end, nothing))
      found = result(m, end, end - m.sq + 1, visible, all_see, true);
  std::free(nothing);
  return found;
}

}  // namespace

int64_t mask_structure(addr first, int64_t b, int64_t sq, int64_t sk, int64_t batch_stride, int64_t row_stride,
                       int64_t bytes, int64_t visible, int64_t hidden, bool all_see) {
  if (b < 1 || sq < 1 || sk < 1) return -1;
  const auto as = [&](auto of) {
    using T = decltype(of);
    return look(Mask<T>{(const T*)first, b, sq, sk, batch_stride, row_stride}, (T)visible, (T)hidden, all_see);
  };
  if (bytes == 1) return as(uint8_t{});
  if (bytes == 2) return as(uint16_t{});
  return bytes == 4 ? as(uint32_t{}) : as(uint64_t{});
}

int64_t all_zero(addr memory, int64_t count, int64_t bytes) {
  const auto as = [&](auto of) {
    using T = decltype(of);
    const T* first = (const T*)memory;
    return count == 0 || (same(*first, (T)0) && equal(first, first + 1, count - 1));
  };
  if (bytes == 2) return as(uint16_t{});
  if (bytes == 4) return as(uint32_t{});
  return bytes == 8 ? as(uint64_t{}) : as(uint8_t{});
}

}  // namespace pyfused::PYFUSED_ISA
