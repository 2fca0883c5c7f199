// What may cpu_bindings.cpp call? Every kernel of every operator, declared in the namespace of the instruction set.
// No include guard: the bindings include it once per instruction set. `addr` is a tensor's data pointer, 0 for none;
// strides count elements; dtype is a code of simd.h. Python has checked everything (pyfused/ops). Any size may be 0.
#include <cstdint>

namespace pyfused::PYFUSED_ISA {

using addr = std::uintptr_t;

// ---- layer_norm and rms_norm ----------------------------------------------------------------------------------------
// Both take the same arguments. rms_norm's bias, mean and grad_bias are 0.
void layer_norm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                        int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype);
void layer_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                         addr grad_weight, addr grad_bias, int64_t rows, int64_t n, int64_t x_stride, int dtype);
void rms_norm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                      int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype);
void rms_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                       addr grad_weight, addr grad_bias, int64_t rows, int64_t n, int64_t x_stride, int dtype);

// ---- attention ------------------------------------------------------------------------------------------------------
// layout: an AttentionLayout. starts: int32 (B + 1), where packed sequences begin. The forward's out, grad_query, grad_key and
// grad_value are dense (B, S, H, D). buckets: int32. grad_table: float (num_buckets, H), zeros at the start.
void attention_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets, addr seed,
                       addr starts, addr out, addr lse, addr layout, int dtype);
void attention_backward(addr grad_out, addr query, addr key, addr value, addr out, addr lse, addr mask, addr bias,
                        addr table, addr buckets, addr seed, addr starts, addr grad_query, addr grad_key,
                        addr grad_value, addr grad_bias, addr grad_table, addr layout, int dtype);

// ---- relative_bias --------------------------------------------------------------------------------------------------
void relative_bias_forward(addr table, addr buckets, addr out, int64_t heads, int64_t sq, int64_t sk, int64_t offset,
                           int64_t span, int64_t bucket_step, int64_t head_step, int dtype);
void relative_bias_backward(addr grad_out, addr buckets, addr grad_table, int64_t heads, int64_t sq, int64_t sk,
                            int64_t offset, int64_t span, int dtype);

// ---- linear ---------------------------------------------------------------------------------------------------------
// transposed: the weight (ffn: both weights) is stored as (k, n), weight_stride from row to row.
// bits: 8 for an int8 weight with scale float32 (n), 4 for int4 (n, k / 2) with scale bfloat16 (n, k / 32), 0 for one of the dtype.
void linear_forward(addr x, addr weight, addr scale, addr bias, addr residual, addr y, int64_t rows, int64_t n, int64_t k,
                    int64_t x_stride, int64_t weight_stride, int64_t residual_stride, bool transposed, int bits, int dtype);

// ---- ffn ------------------------------------------------------------------------------------------------------------
void ffn_forward(addr x, addr w_in, addr b_in, addr w_out, addr b_out, addr residual, addr pre, addr y,
                 int64_t rows, int64_t n, int64_t f, int64_t m, int64_t x_stride, int64_t w_in_stride,
                 int64_t w_out_stride, int64_t residual_stride, bool transposed, int activation, int dtype);
void ffn_activation(addr pre, addr grad_inner, addr inner, addr grad_pre, int64_t count, int activation, int dtype);

// ---- decode ---------------------------------------------------------------------------------------------------------
// plan: a DecodePlan, call: a DecodeCall; see decode_plan.h.
void decode_forward(addr plan, addr call, int dtype);
// from, to: `count` addresses each. Copies `heads` parts of `bytes` bytes, which lie together, to places `step` bytes apart.
void decode_copies(addr from, addr to, int64_t count, int64_t heads, int64_t bytes, int64_t step);

// ---- fourier_mix ----------------------------------------------------------------------------------------------------
// x (b, s, n) has contiguous rows; y is contiguous. fft.h documents the plans and tables of s and n.
// scratch: fourier_mix_scratch() bytes, aligned to 64. Both calls must see the same number of threads.
int64_t fourier_mix_scratch(addr plan_s, addr plan_n, int64_t b, int64_t s, int64_t n);
void fourier_mix_forward(addr x, addr y, addr scratch, addr plan_s, addr table_s, addr plan_n, addr table_n, int64_t b,
                         int64_t s, int64_t n, int64_t batch_stride, int64_t row_stride, int dtype);

// ---- gated_ffn ------------------------------------------------------------------------------------------------------
// keep_gate and keep_up may be 0. hidden and grad_hidden are float32 if dtype is float16, which cannot hold activation(gate) * up.
void gated_ffn_forward(addr x, addr w_gate, addr w_up, addr w_out, addr residual, addr keep_gate, addr keep_up, addr y, int64_t rows,
                       int64_t n, int64_t f, int64_t m, int64_t x_stride, int64_t w_gate_stride, int64_t w_up_stride,
                       int64_t w_out_stride, int64_t residual_stride, int activation, int dtype);
void gated_ffn_activation(addr gate, addr up, addr grad_hidden, addr hidden, addr grad_gate, addr grad_up,
                          int64_t count, int activation, int dtype);

// ---- mask_structure -------------------------------------------------------------------------------------------------
// Reads a mask (B, Sq, Sk) of elements of 1, 2, 4 or 8 bytes with two values, compared by their bits; but -0.0 counts as 0.0 in
// those of more than one byte. Returns 2 * end +
// padding. end is 0 if all queries of an entry see the same keys. Otherwise each query sees keys up to its own place, and the
// last query is at key end - 1. padding is 1 if a key before end is hidden from an entry's last query. Returns -1 for any
// other mask, for an empty one, and if all_see is set and a query sees no key.
int64_t mask_structure(addr first, int64_t b, int64_t sq, int64_t sk, int64_t batch_stride, int64_t row_stride,
                       int64_t bytes, int64_t visible, int64_t hidden, bool all_see);
int64_t all_zero(addr memory, int64_t count, int64_t bytes);  // whether every element is 0 or, as above, -0.0

}  // namespace pyfused::PYFUSED_ISA
