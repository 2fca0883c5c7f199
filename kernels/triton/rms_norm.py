"""rms_norm in Triton: y = total * rstd * weight, with the kernels of _row_norm.py, not centred."""

from functools import partial

from pyfused.kernels.shared import row_norm
from pyfused.kernels.shared.prepared import launched

from ._row_norm import begin_backward, begin_forward

forward = launched(partial(row_norm.rms_norm_forward, begin_forward))
backward = launched(partial(row_norm.rms_norm_backward, begin_backward))
