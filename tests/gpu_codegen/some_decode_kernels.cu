// A kernel of decode for each form and number of rows. All 28 would take nvcc over a minute for a chip.
#include "decode_kernel.cuh"

namespace pyfused::cuda {
namespace {

#define PYFUSED_SOME_KERNEL(...) template __global__ void decode_kernel<__VA_ARGS__>(const PYFUSED_GRID_CONSTANT DecodeArguments);
PYFUSED_SOME_KERNEL(__nv_bfloat16, 8, Form::kAny)
PYFUSED_SOME_KERNEL(float, 4, Form::kAny)
PYFUSED_SOME_KERNEL(__half, 2, Form::kColumns)
PYFUSED_SOME_KERNEL(__nv_bfloat16, 1, Form::kRows)

}  // namespace
}  // namespace pyfused::cuda
