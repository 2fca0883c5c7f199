// What planted.cu offers to test_shim.py: launchers on addresses of CPU tensors.
#pragma once

#include <cstddef>
#include <cstdint>

struct __half;
struct __nv_bfloat16;

namespace planted {

using addr = std::uintptr_t;

void sum(addr x, addr out, int blocks, int flaw);
void exchange(addr x, addr out, bool sync);
void read_beyond(addr x, addr out, int which, int beyond);
void read_unwritten(addr out);
void launch_nothing(unsigned grid_x, unsigned grid_y, unsigned threads, size_t shared, bool ask);
void shuffle(addr x, addr out);
void break_shuffle(addr out, int flaw);
template <class T> void multiply(addr a, addr b, addr c, bool transposed, bool wait);
void relay(addr sums, int blocks, bool begins, bool cooperative);
void count(addr counter, addr seen, int blocks, bool barrier, bool cooperative);
template <class T> void round_trip(addr x, addr narrow_out, addr wide_out, int n);

}  // namespace planted
