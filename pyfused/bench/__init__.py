"""How fast is pyfused, beside plain PyTorch and other peers, in one run on one machine? `pyfused bench`.

The cases are in the top-level folder benchmarks/, imported as pyfused.bench.benchmarks. setup.py maps it there for wheels and
editable installs. If a source tree is only on the path, this file adds the folder, as pyfused.kernels does.
"""

from pathlib import Path

from .case import Calls, Case, Cost, Setup, Values, training
from .cost import cost_of

_root = Path(__file__).resolve().parents[2]
if (_root / "benchmarks" / "bench_attention.py").is_file() and (_root / "csrc").is_dir():
    __path__.append(str(_root))

__all__ = ["Calls", "Case", "Cost", "Setup", "Values", "cost_of", "training"]
