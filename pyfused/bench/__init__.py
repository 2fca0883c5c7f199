"""How fast is it, beside plain PyTorch and other peers, in one run on one machine? `pyfused bench`.

The cases are in the top-level folder benchmarks/, seen as pyfused.bench.benchmarks. A wheel and an editable install map it
there (setup.py); in a source tree that is merely on the path this package looks for the folder, as pyfused.kernels does.
"""

from pathlib import Path

from .case import Calls, Case, Cost, Setup, Values, training
from .cost import cost_of

_root = Path(__file__).resolve().parents[2]
if (_root / "benchmarks" / "bench_attention.py").is_file() and (_root / "csrc").is_dir():
    __path__.append(str(_root))

__all__ = ["Calls", "Case", "Cost", "Setup", "Values", "cost_of", "training"]
