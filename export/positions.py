"""DeBERTa-v2's relative positions in a batch whose rows have adapters of their own.

The layers that project tokens project the table of positions too, (1,P,K), once for all rows. Under a row's own adapter
they are that row's own: the frozen product is computed once, and the operator then works on (batch,P,N) beside the
tokens'.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .adapted import AdaptedLinear

__all__ = ["positions_by_row"]

_SHARED = ("query_proj", "key_proj", "pos_query_proj", "pos_key_proj")


@contextlib.contextmanager
def positions_by_row(model: nn.Module) -> Iterator[None]:
    """Inside, adapted projections of relative positions in `model` give a table for each row, where there are any."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    with contextlib.ExitStack() as undo:
        for attention in model.modules():
            if isinstance(attention, DisentangledSelfAttention):
                adapted = [getattr(attention, name, None) for name in _SHARED]
                _by_row(attention, [layer for layer in adapted if isinstance(layer, AdaptedLinear)], undo)
        yield


def _by_row(attention: Any, layers: list[AdaptedLinear], undo: contextlib.ExitStack) -> None:
    """Lets `layers` of `attention` give positions for each row, which are not repeated for all of them afterwards.

    All arithmetic stays the attention's own.
    """
    bias, split = attention.disentangled_attention_bias, attention.transpose_for_scores

    def bias_by_row(query_layer: torch.Tensor, *others: Any) -> torch.Tensor:
        rows, done = query_layer.size(0) // attention.num_attention_heads, list[torch.Tensor]()

        def split_once(x: torch.Tensor, heads: int) -> Any:
            result = split(x, heads)
            return _Repeated(result) if any(x is own for own in done) else result

        with contextlib.ExitStack() as positions:
            for layer in layers:
                layer.rows = rows
                positions.callback(setattr, layer, "rows", None)
                hook = layer.register_forward_hook(lambda layer, inputs, output: done.append(output))
                positions.callback(hook.remove)
            attention.transpose_for_scores = split_once
            positions.callback(delattr, attention, "transpose_for_scores")
            return bias(query_layer, *others)

    attention.disentangled_attention_bias = bias_by_row
    undo.callback(delattr, attention, "disentangled_attention_bias")


class _Repeated:
    """A tensor that is repeated for each row already."""

    def __init__(self, value: torch.Tensor):
        self._value = value

    def repeat(self, *counts: Any) -> torch.Tensor:
        return self._value
