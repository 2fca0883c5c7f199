// What may cpu_bindings.cpp call of an instruction set for dot products (CMakeLists.txt)? The kernels below, and linear_forward,
// ffn_forward and gated_ffn_forward of ../kernels.h for bfloat16 alone. No include guard, as there.
#include "../kernels.h"

namespace pyfused::PYFUSED_ISA {

// weight: int8 (n, k), scale: float32 (n). k is at most 133144, so that the sums fit into int32.
void linear_dynamic_forward(addr x, addr weight, addr scale, addr bias, addr residual, addr y, int64_t rows, int64_t n,
                            int64_t k, int64_t x_stride, int64_t weight_stride, int64_t residual_stride, int dtype);

}  // namespace pyfused::PYFUSED_ISA
