// How does a launcher run on the caller's device, and how does a CUDA error become a Python exception? Host code only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace pyfused {

// Says which operator, shape and device an error belongs to; pybind11 makes it a RuntimeError.
struct Launch {
  const char* what;
  int64_t rows, n;
  int device;

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // forgets it: the next launch is not to blame
    throw std::runtime_error(std::string(what) + " of shape (" + std::to_string(rows) + ", " + std::to_string(n) +
                             ") on cuda:" + std::to_string(device) + ": " + cudaGetErrorString(error));
  }
  // A launch reports what is wrong with itself at once; what a running kernel does wrong is seen by a later call.
  void check() const { check(cudaGetLastError()); }
  // The blocks of a grid's first dimension, of which a GPU takes 2^31 - 1; cast to unsigned, 2^32 more would look like few.
  unsigned blocks(int64_t count) const {
    if (count > 0x7fffffff)
      throw std::runtime_error(std::string(what) + " of shape (" + std::to_string(rows) + ", " + std::to_string(n) +
                               "): a grid of " + std::to_string(count) + " blocks; a GPU takes 2147483647");
    return (unsigned)count;
  }
};

// Makes `device` current for a scope: this library's static runtime has a current device of its own.
class OnDevice {
 public:
  explicit OnDevice(const Launch& launch) {
    launch.check(cudaGetDevice(&before_));
    if (before_ != launch.device) {
      launch.check(cudaSetDevice(launch.device));
      moved_ = true;
    }
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

// Lets a kernel ask for `bytes` of dynamic shared memory: beyond 48 KiB that needs permission. Call before each launch.
template <class Kernel> void allow_shared(const Launch& launch, Kernel* kernel, size_t bytes) {
  if (bytes > 48 * 1024)
    launch.check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a grid: a kernel goes round again over what is beyond.
inline unsigned capped(int64_t blocks) { return (unsigned)(blocks < (1 << 30) ? blocks : 1 << 30); }

// Threads of a block that owns a row of n elements, `each` of them a thread: whole warps, 1024 at most.
inline unsigned row_threads(int64_t n, int each) {
  const int64_t warps = up(up(n, each), 32);
  return (unsigned)((warps < 32 ? warps : 32) * 32);
}

inline bool aligned16(std::initializer_list<std::uintptr_t> addresses) {
  for (std::uintptr_t a : addresses)
    if (a % 16) return false;
  return true;
}

}  // namespace pyfused
