"""How does a kernel add a tile's product to its sums? In float32 by a sum of its own, in 16 bits in the matrix unit."""

import triton
import triton.language as tl


@triton.jit
def add_product(total, a, b):
    """total + a b, with sums in float32, or in int32 for integers. float32 tiles multiply in float32, not TF32.

    A float32 product is one chain of multiply-adds for each element. Its rounding error grows with the chain: after n terms it
    is about sqrt(n / 6) half units in the last place. cuBLAS has short chains where a product has few rows: an H200 showed 1.6
    times the allowed error here, from chains of 768. So a tile's chain starts at zero, and its sum is added to `total`. Tiles
    of 32 take 1/32 more instructions and leave a third of the error. Errors of 16-bit inputs are far larger.
    """
    if a.dtype == tl.float32:
        # If max_num_imprecise_acc is 0 Triton moves the addition into the product. On float32 it has no other effect.
        return total + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)
