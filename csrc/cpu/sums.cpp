// The CPU products' kernels that linear, ffn, gated_ffn and decode share, compiled here once for an instruction set.
#include "pyfused/gemm_columns.h"
#include "pyfused/gemm_tiles.h"
#include "pyfused/gemv_columns.h"
#include "pyfused/gemv_tiles.h"

namespace pyfused::PYFUSED_ISA {

template struct Sums<float, Elements>;
template struct Sums<f16, Elements>;
template struct Sums<bf16, Elements>;
template struct Sums<int8_t, Elements>;
template struct Sums<int4x2, Elements>;
#if defined(PYFUSED_DOT_BF16)  // by the builder's own flags
template struct Sums<bf16, Pairs>;
#endif

template struct ColumnSums<float>;
template struct ColumnSums<f16>;
template struct ColumnSums<bf16>;
template struct PanelSums<float>;
template struct PanelSums<f16>;
template struct PanelSums<bf16>;

template struct Ending<float>;
template struct Ending<f16>;
template struct Ending<bf16>;

}  // namespace pyfused::PYFUSED_ISA
