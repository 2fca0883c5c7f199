"""How does generation use the operator `decode`? With a plan of the model as it is now, where a kernel runs it."""

from __future__ import annotations

from torch import Tensor

from ..decode_plan import DecodePlan
from ..models.backbone import Backbone
from ..nn import KVCache
from ..ops.decode import backend_of, run, step_of
from .plans import plan_of
from .sampling import Choice, likeliest_token


class Decoder:
    """Steps of one generation, all on the same cache. in_graph: a CUDA graph may capture them."""

    def __init__(self, plan: DecodePlan, cache: KVCache, in_graph: bool = False):
        self._plan, self._cache = plan, cache
        self._rows, self._is_native = -1, False
        self._backends = ("cuda",) if in_graph else ("cpu", "cuda")

    @classmethod
    def of(cls, model: Backbone, cache: KVCache, in_graph: bool = False) -> Decoder | None:
        """None if the model has no plan."""
        plan = plan_of(model)
        return None if plan is None else cls(plan, cache, in_graph)

    def __call__(self, tokens: Tensor, choose: bool | Choice) -> Tensor | None:
        """tokens (B,) -> logits (B, V), or with `choose` tokens (B,), as `chosen` says. It does not count the token in the
        cache. None where no kernel of `decode` runs this: the model's modules are faster than its plain form."""
        step = step_of(tokens, self._cache, choose=bool(choose))
        if isinstance(choose, Choice) and not choose.sampler.is_greedy:
            temperature, top_k, top_p = choose.sampler.cuts
            uniform = choose.uniform.contiguous()
            step = step._replace(uniform=uniform, temperature=temperature, top_k=top_k, top_p=top_p)
        if self._rows != len(tokens):  # whether a kernel runs depends on the rows
            self._rows, self._is_native = len(tokens), backend_of(self._plan, step) in self._backends
        if not self._is_native:
            return None
        logits, token = run(self._plan, step)
        return token if choose else logits


def chosen(logits: Tensor, choose: bool | Choice) -> Tensor:
    """The logits; with True the likeliest tokens; or the tokens of a Choice."""
    if isinstance(choose, Choice):
        return choose(logits)
    return likeliest_token(logits) if choose else logits
