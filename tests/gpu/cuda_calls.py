"""Which calls does compute-sanitizer check? Every small call of operator_calls.py that CUDA kernels take, in three dtypes, with
each result read back. Without a GPU they run on the host shim. Arguments: prefixes of the calls' names.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/cuda_calls.py ["rms_norm 37" ...]
"""

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "cuda_on_cpu")]

import operator_calls  # noqa: E402

from pyfused import dispatch, extensions  # noqa: E402
from pyfused.testing import running  # noqa: E402


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        import shim

        extensions.emulate_cuda(shim.load)
    ran, left = 0, set()
    for name in filter(lambda name: name.startswith(tuple(sys.argv[1:] or [""])), operator_calls.CALLS):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            call = operator_calls.prepared(name, device, dtype)
            try:
                with running("cuda"):
                    results = call()
            except dispatch.BackendError:
                left.add(name)
                continue
            assert all(torch.isfinite(t).all() for t in results), f"{name} in {dtype}"
            ran += 1
    print(f"{ran} calls ran on {device}; left to other backends: {', '.join(sorted(left)) or 'none'}")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
