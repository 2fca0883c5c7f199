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
    cudaGetLastError();  // clears the error, so the next launch does not report it
    throw std::runtime_error(std::string(what) + " of shape (" + std::to_string(rows) + ", " + std::to_string(n) +
                             ") on cuda:" + std::to_string(device) + ": " + cudaGetErrorString(error));
  }
  // Reports an error of the launch itself. A later call reports errors of the running kernel.
  void check() const { check(cudaGetLastError()); }
  // The blocks of a grid's first dimension. A GPU takes 2^31 - 1, and a cast to unsigned would hide a count above 2^32.
  unsigned blocks(int64_t count) const {
    if (count > 0x7fffffff)
      throw std::runtime_error(std::string(what) + " of shape (" + std::to_string(rows) + ", " + std::to_string(n) +
                               "): a grid of " + std::to_string(count) + " blocks; a GPU takes 2147483647");
    return (unsigned)count;
  }
};

// Makes `device` current for a scope. This library links its own static runtime, which has its own current device.
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

// Lets a kernel use `bytes` of dynamic shared memory. Call it before each launch. More than 48 KiB need permission, and the
// kernel's own variables count: at most 1 KiB (tests/gpu_codegen/test_cuda_codegen.py).
template <class Kernel> void allow_shared(const Launch& launch, Kernel* kernel, size_t bytes) {
  if (bytes > 47 * 1024)
    launch.check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a grid, at most 2^30. The kernel loops over the rest.
inline unsigned capped(int64_t blocks) { return (unsigned)(blocks < (1 << 30) ? blocks : 1 << 30); }

// Threads of a block that owns a row of n elements, `each` elements per thread: whole warps, at most 1024.
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
