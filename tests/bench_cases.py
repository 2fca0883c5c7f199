"""Which cases do the tests of `pyfused bench` measure?"""

import torch
import torch.nn.functional as F

from pyfused.bench import Calls, Case
from pyfused.bench.measure import measure


def case(change=lambda y: y, dtype=torch.float32, **more):
    """pyfused's product, altered by `change`, beside torch's."""
    x, w = (torch.randn(n, 96).to(dtype) for n in (33, 70))
    return Case("product", dtype, lambda: Calls(lambda x, w: change(F.linear(x, w)), F.linear, (x, w), **more))


def row_of(one, peers=None):
    return measure(one, "cpu", peers or {}, 0.0)
