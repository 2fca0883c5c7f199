"""How does a layer work whose norms come before its branches, as in GPT-2 and T5? And how does a stack of them run?

    x += attention(norm(x));  x += cross_attention(norm(x), memory), where there is one;  x += feed_forward(norm(x))

The residual stream x and its last branch travel as a pair. The next norm adds the branch to the stream, so no addition is a
pass of its own. B batch, S sequence, D hidden_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..nn import CrossAttention, RelativeSelfAttention, SelfAttention, Visibility
from ..nn.layers import dropped
from ..nn.wide import is_wide
from ..spread import is_wrapped
from .call import Call


class PreNormLayer(nn.Module):
    """One layer.

    Args:
        index: its place in the cache.
        norm: a function that makes a norm.
        attention, cross_attention, feed_forward: its branches; cross_attention may be None.
        dropout: the rate behind each branch, in training.
    """

    def __init__(
        self,
        index: int,
        norm: Callable[[], nn.Module],
        attention: SelfAttention,
        cross_attention: CrossAttention | None,
        feed_forward: nn.Module,
        dropout: float,
    ):
        super().__init__()
        self.index, self.dropout = index, dropout
        self.attention_norm, self.attention = norm(), attention
        self.cross_attention_norm: Any = None if cross_attention is None else norm()
        self.cross_attention = cross_attention
        self.feed_forward_norm, self.feed_forward = norm(), feed_forward

    def forward(self, x: Tensor, branch: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """x, branch (B, S, D) -> the pair behind this layer. The layer's output is their sum."""
        y, x = (self.attention_norm(x), x) if branch is None else self.attention_norm(x, branch)
        branch = self._dropped(self.attention(y, call.visible, call.cache, self.index, call.attentions))
        if self.cross_attention is not None and (key_value := self._encoder_keys(call)) is not None:
            y, x = self.cross_attention_norm(x, branch)
            real = Visibility(padding_mask=call.memory_mask)
            branch = self._dropped(self.cross_attention(y, key_value, real, call.cross_attentions))
        y, x = self.feed_forward_norm(x, branch)
        return x, self._dropped(self.feed_forward(y, wide=True) if is_wide(x, y) else self.feed_forward(y))

    def _encoder_keys(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """The encoder's keys and values. They are projected once; a cache keeps them and their mask."""
        cache = call.cache
        key_value = None if cache is None else cache.cross[self.index]
        if key_value is None and call.memory is not None and self.cross_attention is not None:
            key_value = self.cross_attention.project(call.memory)
            if cache is not None:
                cache.cross[self.index], cache.encoder_mask = key_value, call.memory_mask
        return key_value

    def _dropped(self, branch: Tensor) -> Tensor:
        return dropped(branch, self.dropout if self.training else 0.0)


class RelativeLayer(PreNormLayer):
    """T5's layer: its attention adds a bias by relative position. The first layer of a stack has the table, and shares it with
    the others through call.visible."""

    attention: RelativeSelfAttention

    def forward(self, x: Tensor, branch: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """As PreNormLayer's. A bias in call.visible replaces the table."""
        visible = call.visible
        if visible.attn_bias is None and visible.relative_bias is None:
            bias = self.attention.position_bias()
            if bias is not None and (is_wrapped(self) or is_wrapped(self.attention)):
                bias = bias._replace(table=bias.table.clone())  # fully_shard frees the table behind this layer's call
            call.visible = replace(visible, relative_bias=bias)
        return super().forward(x, branch, call)


def through(layers: Iterable[Any], x: Tensor, call: Call) -> tuple[Tensor, Any]:
    """x (B, S, D), or packed, through the layers -> the stream and its last branch. Collects the states in between."""
    branch: Any = None
    for layer in layers:
        if call.hidden_states is not None:
            call.hidden_states.append(call.visible.unpacked(x if branch is None else x + branch))
        x, branch = layer(x, branch, call)
    return x, branch
