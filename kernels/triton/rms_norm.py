"""rms_norm in Triton: y = total * rstd * weight, with the kernels of _row_norm.py, not centred."""

from functools import partial

from pyfused.kernels.shared import row_norm
from pyfused.kernels.shared.prepared import prepares_launch

from ._row_norm import begin_backward, begin_forward

forward = prepares_launch(partial(row_norm.rms_norm_forward, begin_forward))
backward = prepares_launch(partial(row_norm.rms_norm_backward, begin_backward))
