"""How is a file damaged? Bits, cuts, ranges of zeros and noise, lengths and moved pieces, from a seed that is printed."""

import random
import re
from collections.abc import Iterator

_LENGTHS = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
_NUMBERS = (b"-1", b"0", b"1e999", b"NaN", b"9" * 30, b"2147483647", b"9223372036854775807", b"true", b"null", b'""', b"[]",
            b"{}",            b'"\\u0000"', b"0.5", b"[[[[]]]]")  # fmt: skip


def mutants(content: bytes, count: int, seed: int, *, upto: int | None = None) -> Iterator[bytes]:
    """``count`` damaged copies of ``content``. The damage lies in the first ``upto`` bytes, but for cuts."""
    print(f"seed {seed}")
    for i in range(count):
        yield _mutant(content, random.Random(seed * 1_000_003 + i), upto or len(content))


def _mutant(content: bytes, chance: random.Random, upto: int) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        at = chance.randrange(upto)
        end = at + chance.choice((1, 4, 8, 64, 512))
        kind = chance.choice(
            ("bit", "bit", "zeros", "noise", "length", "length", "cut", "copy", "remove", "value", "value")
        )
        if kind == "bit" and at < len(damaged):
            damaged[at] ^= 1 << chance.randrange(8)
        elif kind == "zeros":
            damaged[at:end] = bytes(len(damaged[at:end]))
        elif kind == "noise":
            damaged[at:end] = chance.randbytes(len(damaged[at:end]))
        elif kind == "length":
            width = chance.choice((1, 2, 4, 8))
            at -= at % width
            value = chance.choice((*_LENGTHS, len(content), len(content) - 1, chance.getrandbits(16)))
            damaged[at : at + width] = (value % 256**width).to_bytes(width, chance.choice(("little", "little", "big")))
        elif kind == "cut":
            del damaged[chance.randrange(len(damaged) + 1) :]
        elif kind == "copy":
            other = chance.randrange(upto)
            damaged[at:end] = damaged[other : other + (end - at)]
        elif kind == "remove":
            del damaged[at:end]
        elif places := list(
            re.finditer(rb'(?<=[:\[, ])("[^"]*"|-?\d[\d.e+-]*|true|false|null|\[\]|\{\})', damaged[:upto])
        ):
            place = chance.choice(places)
            damaged[place.start() : place.end()] = chance.choice(_NUMBERS)
    return bytes(damaged)
