"""layer_norm in Triton: y = (total - mean) * rstd * weight + bias, with the centred kernels of _row_norm.py."""

from functools import partial

from pyfused.kernels.shared import row_norm
from pyfused.kernels.shared.prepared import launched

from ._row_norm import begin_backward, begin_forward

forward = launched(partial(row_norm.layer_norm_forward, begin_forward))
backward = launched(partial(row_norm.layer_norm_backward, begin_backward))
