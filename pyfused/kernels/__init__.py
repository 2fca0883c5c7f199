"""Where do the kernels live? In the top-level folder kernels/, one sub-package per backend, seen as pyfused.kernels.*.

A wheel and an editable install map them there themselves (setup.py). In a source tree that is merely on the path this
package looks for the folder beside it; the check for csrc keeps it from taking another project's `kernels` package.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "kernels" / "reference").is_dir() and (_root / "csrc").is_dir():
    __path__.append(str(_root / "kernels"))
