// attention's kernels in float16. Those in bfloat16, and the packed ones, have the same templates.
#include "attention_launch.cuh"

namespace pyfused::cuda {
namespace {

template void by_case<__half, false>(const Launch&, const Attention&, int, addr);

}  // namespace
}  // namespace pyfused::cuda
