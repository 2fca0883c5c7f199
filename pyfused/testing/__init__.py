"""How is a result judged? The tolerance rule, and the backends to judge."""

from .backends import available, running
from .tolerance import Judgement, assert_close, judge

__all__ = ["Judgement", "assert_close", "available", "judge", "running"]
