"""The second step of a parity check: what PyTorch computes, with the adapter and without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..pytorch.base import Outputs
from ..pytorch.oracle import run_torch
from ..pytorch.shared import named_as
from .case import Case
from .result import Step

__all__ = ["TorchOutputs", "run_pytorch"]


@dataclass(frozen=True)
class TorchOutputs:
    """Outputs by batch: with the adapter `on`, with its layers `off`, and what a swappable model's `default` is."""

    on: Sequence[Outputs]
    off: Sequence[Outputs]
    default: Sequence[Outputs]


def run_pytorch(case: Case, step: Step) -> TorchOutputs:
    """Every batch of `case` through PEFT's model. Raises UserError where it lacks an output that the export has."""
    on, off = [], []
    for number, batch in enumerate(case.batches, 1):
        step(f"running PyTorch, batch {number} of {len(case.batches)}")
        on.append(named_as(run_torch(case.base, batch), case.part))
        off.append(named_as(run_torch(case.base, batch, adapter_on=False), case.part))
    if unknown := sorted(set(case.outputs) - set(on[0])):
        raise UserError(
            f"{case.model} gives {', '.join(case.outputs)}, PyTorch's model gives {', '.join(on[0])}: no counterpart "
            f"for {', '.join(unknown)}. Expected a model that loratrf-export made for the same task."
        )
    swappable = case.manifest and case.manifest.swappable
    if not swappable or (swappable.default != "base" and not case.grouped):
        return TorchOutputs(on, off, on)
    if case.grouped:
        heads = set(case.adapter.modules_to_save)
    else:
        heads = {weight.module for weight in swappable.weights if weight.default == "base" and not weight.in_layer}
    without = [run_torch(case.base, batch, adapter_on=False, heads_off=heads) for batch in case.batches]
    return TorchOutputs(on, off, [named_as(outputs, case.part) for outputs in without])
