// What may cuda_bindings.cpp call? The launchers of every operator. `addr` is a device pointer or a stream handle, 0
// for none; strides count elements; dtype is 0 float32, 1 float16, 2 bfloat16. Python has checked everything.
// A launcher returns once the kernels are in the stream; a CUDA error throws std::runtime_error.
#pragma once

#include <cstdint>

namespace pyfused::cuda {

using addr = std::uintptr_t;

// ---- layer_norm and rms_norm ----------------------------------------------------------------------------------------
// Both take the same arguments. rms_norm's bias, mean and grad_bias are 0.
void layer_norm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                        int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype,
                        int device, addr stream);
// The number of shares of the rows. `partial` holds (2, n) floats for each share, (1, n) for rms_norm.
int64_t layer_norm_backward_parts(int64_t rows, int64_t n, int multiprocessors);
void layer_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                         addr grad_weight, addr grad_bias, addr partial, int64_t parts, int64_t rows, int64_t n,
                         int64_t x_stride, int dtype, int device, addr stream);
void rms_norm_forward(addr x, addr residual, addr weight, addr bias, addr y, addr total, addr mean, addr rstd,
                      int64_t rows, int64_t n, int64_t x_stride, int64_t residual_stride, double eps, int dtype,
                      int device, addr stream);
int64_t rms_norm_backward_parts(int64_t rows, int64_t n, int multiprocessors);
void rms_norm_backward(addr grad_y, addr grad_total, addr x, addr weight, addr mean, addr rstd, addr grad_x,
                       addr grad_weight, addr grad_bias, addr partial, int64_t parts, int64_t rows, int64_t n,
                       int64_t x_stride, int dtype, int device, addr stream);

// ---- linear, up to 16 rows ------------------------------------------------------------------------------------------
// y = activation(x weight^T + bias) + residual. pre, if not 0, receives the activation's argument. by_columns: at most 8 rows,
// and the weight is (k, n) in memory. wide_x: x is float32 and the weights are float16.
void linear_forward(addr x, addr weight, addr bias, addr residual, addr y, addr pre, int64_t rows, int64_t n, int64_t k,
                    int64_t x_stride, int64_t weight_stride, bool by_columns, int64_t residual_stride, int activation,
                    bool wide_x, int dtype, int device, addr stream);

// ---- ffn ------------------------------------------------------------------------------------------------------------
// Up to 16 rows. `inner` is (rows, f); `pre` is (rows, f) or 0.
void ffn_forward(addr x, addr w_in, addr b_in, addr w_out, addr b_out, addr residual, addr inner, addr pre, addr y,
                 int64_t rows, int64_t n, int64_t f, int64_t m, int64_t x_stride, int64_t w_in_stride, bool in_by_columns,
                 int64_t w_out_stride, bool out_by_columns, int64_t residual_stride, int activation, int dtype, int device,
                 addr stream);
// inner = activation(pre). If grad_inner is not 0, grad_pre = grad_inner activation'(pre). All are contiguous; an output
// may be its own input.
void ffn_activation(addr pre, addr grad_inner, addr inner, addr grad_pre, int64_t size, int activation, int dtype,
                    int device, addr stream);

// ---- attention ------------------------------------------------------------------------------------------------------
// Every launcher takes these. layout: an AttentionLayout in host memory. The rest is on the device. buckets: int32. cu_seqlens:
// int32 (B + 1), where packed sequences begin, from 0 to Sq; lse is then (H, Sq).
struct AttentionPointers {
  addr query, key, value, mask, bias, table, buckets, seed, cu_seqlens, out, lse, layout;
};
// A tile of queries visits all keys. float16 and bfloat16 use the tensor cores, float32 the ordinary ones.
void attention_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets, addr seed,
                       addr cu_seqlens, addr out, addr lse, addr layout, int multiprocessors, int dtype, int device,
                       addr stream);
// The same for packed sequences, which have neither mask nor bias.
void attention_packed_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets,
                              addr seed, addr cu_seqlens, addr out, addr lse, addr layout, int multiprocessors,
                              int dtype, int device, addr stream);
// At most 16 rows (the queries of all heads that share a key head) visit `chunk` keys per block. With more than one chunk,
// out and lse are float32 parts (chunks, ...), and attention_combine adds them up.
void attention_decode_forward(addr query, addr key, addr value, addr mask, addr bias, addr table, addr buckets,
                              addr seed, addr cu_seqlens, addr out, addr lse, addr layout, int64_t chunk, int dtype,
                              int device, addr stream);
void attention_combine(addr part, addr part_lse, addr out, addr lse, addr layout, int64_t chunks, int dtype, int device,
                       addr stream);

// ---- decode ---------------------------------------------------------------------------------------------------------
// plan, call: a DecodePlan and a DecodeCall (decode_plan.h) in host memory. All addresses in them, plan.layer too, are on the
// device, but not call.caches and call.cross_caches. `place` counts only without `places`, `most` never. At most 8 rows.
// by_columns: some matrix of a layer is stored by columns.
// Bytes of shared memory of a block.
int64_t decode_shared(addr plan, addr call, int threads, bool by_columns, int dtype);
// The blocks of a launch, if a block may have that much: one for each multiprocessor. 0 if the device launches none of them
// together.
int decode_blocks(addr plan, addr call, int threads, bool by_columns, int multiprocessors, int dtype, int device);
// Bytes of scratch memory.
int64_t decode_scratch(addr plan, addr call, int blocks, bool by_columns);
// The most caches: keys and values of all layers, and the encoder's.
int decode_most_addresses();
// wide: 16-byte accesses to the rows of memory of all weights are aligned and end with the row. form: a Form of decode_product.cuh.
void decode_forward(addr plan, addr call, addr scratch, int blocks, int threads, bool by_columns, bool wide, int form,
                    int dtype, int device, addr stream);

// ---- fourier_mix ----------------------------------------------------------------------------------------------------
// x (b, s, n) has contiguous features; y is contiguous. The plans are in host memory, the tables on the device;
// csrc/cpu/fft.h documents both. scratch: fourier_mix_scratch() floats.
int64_t fourier_mix_scratch(addr plan_s, int64_t b, int64_t s, int64_t n);
// The longest transform or convolution that fits in shared memory.
int64_t fourier_mix_longest();
void fourier_mix_forward(addr x, addr y, addr scratch, addr plan_s, addr table_s, addr plan_n, addr table_n, int64_t b,
                         int64_t s, int64_t n, int64_t batch_stride, int64_t row_stride, int dtype, int device,
                         addr stream);

// ---- gated_ffn ------------------------------------------------------------------------------------------------------
// Up to 16 rows. `hidden` is (rows, f), float32 if the dtype is float16. gate and up are (rows, f) or 0.
void gated_ffn_forward(addr x, addr w_gate, addr w_up, addr w_out, addr residual, addr hidden, addr gate, addr up,
                       addr y, int64_t rows, int64_t n, int64_t f, int64_t m, int64_t x_stride, int64_t w_gate_stride,
                       int64_t w_up_stride, int64_t w_out_stride, int64_t residual_stride, int activation, int dtype,
                       int device, addr stream);
// hidden = activation(gate) * up, float32 if the dtype is float16. If grad_hidden is not 0, also the gradients of gate and
// up. All are contiguous; an output may be an input.
void gated_ffn_activation(addr gate, addr up, addr grad_hidden, addr hidden, addr grad_gate, addr grad_up, int64_t size,
                          int activation, int dtype, int device, addr stream);
// The same forward in float16 with a power-of-two scale per row: hidden * scale[row] = activation(gate) * up.
void gated_ffn_scaled(addr gate, addr up, addr hidden, addr scale, int64_t rows, int64_t f, int activation, int device,
                      addr stream);
// y = y * scale[row] + residual in float16, in place; y (rows, m) contiguous.
void gated_ffn_unscale(addr y, addr scale, addr residual, int64_t rows, int64_t m, int64_t residual_stride, int device,
                       addr stream);

}  // namespace pyfused::cuda
