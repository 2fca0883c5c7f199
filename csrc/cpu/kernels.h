// What may cpu_bindings.cpp call? Every kernel of every operator, declared in the namespace of the instruction set.
// No include guard: the bindings include it once per instruction set. `addr` is a tensor's data pointer, 0 for none;
// strides count elements; dtype is a code of simd.h. Python has checked everything (pyfused/ops).
#include <cstdint>

namespace pyfused::PYFUSED_ISA {

using addr = std::uintptr_t;

// ---- layer_norm -----------------------------------------------------------------------------------------------------
void layer_norm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                        int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype);
void layer_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                         addr grad_weight, addr grad_bias, int64_t rows, int64_t n, int64_t x_stride, int dtype);

// ---- attention ------------------------------------------------------------------------------------------------------
// layout: int64 B, H, Hkv, Sq, Sk, D, then (batch, head, sequence) strides of query, key and value, the bias's four, and
// for the backward those three of out and of grad_out. out, grad_query, grad_key and grad_value are dense (B, S, H, D).
void attention_forward(addr query, addr key, addr value, addr mask, addr bias, addr seed, addr out, addr lse,
                       addr layout, bool causal, double scale, double dropout_p, int dtype);
void attention_backward(addr grad_out, addr query, addr key, addr value, addr out, addr lse, addr mask, addr bias,
                        addr seed, addr grad_query, addr grad_key, addr grad_value, addr grad_bias, addr layout,
                        bool causal, double scale, double dropout_p, int dtype);

}  // namespace pyfused::PYFUSED_ISA
