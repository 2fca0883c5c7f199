// The kernels of ../sums.cpp for an instruction set for dot products: those that its products use.
#include "pyfused/ending.h"
#include "pyfused/gemm_tiles.h"
#include "pyfused/gemv_tiles.h"

namespace pyfused::PYFUSED_ISA {

#if defined(PYFUSED_DOT_BF16)
template struct Sums<bf16, Pairs>;
#endif
template struct Sums<int8_t, Quads>;

template struct Ending<float>;
template struct Ending<f16>;
template struct Ending<bf16>;

}  // namespace pyfused::PYFUSED_ISA
