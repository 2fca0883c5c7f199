"""Which queries does a program of the forward for Hopper attend for, and in which order does it walk the keys?

A block is the queries of one head that a program takes at a time. As many programs as the GPU has multiprocessors share the
blocks. A tile is BLOCK_N keys. Tiles are walked from those that need a mask, last first, to those that need none: far tiles,
then near ones (T5's bias, as in pyfused/kernels/triton/_attention_relative.py).

The last block of a head ends with its last query, so the first one may begin before query 0. Under a causal mask that one has
the fewest keys too. Without one these short blocks come after all others, and programs end at about the same time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def blocks_of_program(blocks):
    """How many blocks a program has. Of each gl.num_programs() blocks it has one, forwards and backwards in turn: causal blocks
    come longest first, and so no program has the longest each time."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    whole, rest = blocks // programs, blocks % programs
    return whole + gl.where(gl.where(whole % 2 == 0, program, programs - 1 - program) < rest, 1, 0)


@gluon.jit
def block(k, order, sizes, QUERIES: gl.constexpr, BLOCK_N: gl.constexpr, IS_CAUSAL: gl.constexpr, NEAR: gl.constexpr):
    """A program's k-th block: (batch, head, first_query, count, masked, near_first, near_last). Of its `count` tiles the last
    `masked` need a mask; those from near_first on and before near_last have near distances.

    The blocks of `together` heads come together, the last queries first; from block `late` on come the first ones of all heads.
    """
    late, blocks_of_head, together = order
    heads, query_length, key_length, span = sizes
    program, programs = gl.program_id(0), gl.num_programs(0)
    number = k * programs + gl.where(k % 2 == 0, program, programs - 1 - program)
    group, place = number // (blocks_of_head * together), number % (blocks_of_head * together)
    row = gl.where(number < late, group * together + place % together, number - late)
    back = gl.where(number < late, place // together, blocks_of_head)
    first_query = query_length - (back + 1) * QUERIES
    shift = key_length - query_length
    end, full_end = key_length, key_length
    if IS_CAUSAL:
        end = gl.minimum(end, first_query + QUERIES + shift)
        full_end = gl.minimum(end, first_query + shift + 1)
    count = gl.maximum(gl.cdiv(end, BLOCK_N), 1)  # a tile at least: its masks leave rows without a key zeros
    masked = gl.maximum(count - gl.maximum(full_end, 0) // BLOCK_N, 1)
    near_first, near_last = 0, 0
    if NEAR:
        first = first_query + shift
        near_first = gl.minimum(gl.cdiv(gl.maximum(first - span - BLOCK_N + 2, 0), BLOCK_N), count - masked)
        near_last = gl.minimum(gl.cdiv(gl.maximum(first + QUERIES - 1 + span, 0), BLOCK_N), count - masked)
        near_last = gl.maximum(near_last, near_first)
    return row // heads, row % heads, first_query, count, masked, near_first, near_last


@gluon.jit
def start_of(i, count, masked, near_first, near_last, BLOCK_N: gl.constexpr):
    """The first key of the tile that comes i-th."""
    far = count - masked - (near_last - near_first)
    k = i - masked
    unmasked = gl.where(k < near_first, k, k + near_last - near_first)
    unmasked = gl.where(k < far, unmasked, near_first + k - far)
    return gl.where(i < masked, count - 1 - i, unmasked) * BLOCK_N
