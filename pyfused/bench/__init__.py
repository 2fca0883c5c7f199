"""How fast is it, beside plain PyTorch and other peers, in one run on one machine?"""

from .measure import Case, ceilings, measure, render

__all__ = ["Case", "ceilings", "measure", "render"]
