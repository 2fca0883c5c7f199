"""layer_norm in Triton: y = (total - mean) * rstd * weight + bias, with the centred kernels of _row_norm.py."""

from functools import partial

from pyfused.kernels.shared import row_norm
from pyfused.kernels.shared.prepared import prepares_launch

from ._row_norm import begin_backward, begin_forward

forward = prepares_launch(partial(row_norm.layer_norm_forward, begin_forward))
backward = prepares_launch(partial(row_norm.layer_norm_backward, begin_backward))
