// What does a launch do, and what do CUDA's own functions? One launch at a time; any number of OS threads may ask.
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cuda_runtime.h"
#include "scheduler.h"

namespace cuda_on_cpu {

bool failed = false;
std::string failure;

namespace {

// A chip gives 48 KiB without being asked, and a kernel's own variables count. The shim does not know those: at most 1 KiB.
constexpr size_t kSharedWithoutAsking = 47 * 1024, kSharedMost = 227 * 1024;

cudaError_t last_error = cudaSuccess;
std::map<const void*, size_t> shared_allowed;
bool looking = false;  // launches are checked and written down, not run
std::string seen;
std::mutex launching;

}  // namespace

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

void fail(const std::string& message) {
  if (!failed) failure = message;
  failed = true;
}

void launch(const void* kernel, const char* name, dim3 grid, dim3 dim, size_t shared, bool cooperative, Body run_body,
            const void* context) {
  std::lock_guard<std::mutex> guard(launching);
  const uint64_t threads = (uint64_t)dim.x * dim.y * dim.z;
  const size_t allowed = shared_allowed.count(kernel) ? shared_allowed[kernel] : kSharedWithoutAsking;
  failed = false;
  if (threads == 0 || threads > 1024) fail("a block of " + std::to_string(threads) + " threads");
  else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("a grid of " + text({grid.x, grid.y, grid.z}) + " blocks");
  else if (shared > allowed)
    fail(std::to_string(shared) + " bytes of dynamic shared memory; allowed are " + std::to_string(allowed));
  else if (looking)
    seen += std::string(name) + " " + std::to_string(grid.x) + " " + std::to_string(grid.y) + " " +
            std::to_string(grid.z) + " " + std::to_string(threads) + " " + std::to_string(shared) + "\n";
  else
    run_grid(grid, dim, shared, cooperative, run_body, context);
  if (failed) {
    failure = std::string(name) + ": " + failure;
    last_error = cudaErrorLaunchFailure;
  }
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return error == cudaErrorLaunchFailure ? failure.c_str() : "invalid argument";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || (size_t)bytes > kSharedMost) return last_error = cudaErrorInvalidValue;
  std::lock_guard<std::mutex> guard(launching);
  shared_allowed[kernel] = bytes;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  return cudaSuccess;
}

// From now on launches are looked at, or run again; what was seen of them since looking began: a line each.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_look(bool on) {
  std::lock_guard<std::mutex> guard(launching);
  looking = on;
  if (on) seen.clear();
}
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_seen() { return seen.c_str(); }

// The names of the grid barriers of the last cooperative launch: a line each.
extern "C" __attribute__((visibility("default"))) const char* cuda_on_cpu_grid_barriers() { return grid_barriers.c_str(); }

// Which way threads and blocks are run from now on; see Order.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_set_order(uint64_t which) {
  std::lock_guard<std::mutex> guard(launching);
  order = which;
}
