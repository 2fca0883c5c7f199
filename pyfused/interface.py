"""Was an extension built for this checkout? A digest of the C++ files that say what Python may call and how memory is laid out.

setup.py compiles it into the extensions, so this file needs the standard library alone. Comments and spaces do not count. A
kernel that computes the same in another way has the same interface.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"  # only a checkout has it

_SHARED = tuple(f"include/pyfused/{name}.h" for name in ("activation_codes", "attention_layout", "decode_plan"))
FILES = {
    "_cpu": ("cpu_bindings.cpp", "cpu/kernels.h", "cpu/dot/kernels.h", "cpu/fft.h", *_SHARED),
    "_cuda": ("cuda_bindings.cpp", "cuda/kernels.h", "cuda/fft.cuh", *_SHARED),
}


def digest(name: str, sources: Path = SOURCES) -> str:
    """The interface of an extension, "_cpu" or "_cuda", in a folder csrc: 16 hexadecimal digits, or "" without the folder."""
    paths = [sources / file for file in FILES[name]]
    if not all(path.is_file() for path in paths):
        return ""
    code = (re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL) for path in paths)
    return hashlib.sha256("\0".join("".join(text.split()) for text in code).encode()).hexdigest()[:16]
