"""Does a grouped model compute, row by row, what PyTorch computes with that row's adapter?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import read_adapter
from ..errors import UserError, some
from ..formats.swappable import read_swappable
from ..ops.schemas import ADAPTER_IDS
from ..pytorch.base import Inputs, Outputs, load_base
from ..pytorch.oracle import load_reference, run_torch
from .checks import TOLERANCES, effect_checks, parity_checks
from .inputs import default_inputs, padding_mask
from .onnx_runs import load_graph, model_dtype, run_batches
from .result import VARIANTS, Check, ParityReport
from .single import versions

if TYPE_CHECKING:
    from ..pytorch.base import BaseModel

__all__ = ["check_grouped_parity"]


def check_grouped_parity(
    model: str | Path,
    adapters: Mapping[str, str | Path],
    base_model: str | Path | None = None,
    *,
    tolerance: float | None = None,
    step: Callable[[str], None] = lambda text: None,
) -> ParityReport:
    """For each row, max|onnx - torch| / max|torch| <= tolerance, torch being PEFT with the adapter of that row alone.

    `adapters` (name -> folder) are all of the model's, by its own names. Every batch runs with each adapter on all
    rows, with the base on all rows (id -1) and with adapters and base mixed, with the library and without; and each
    adapter must make a difference to the base, as in `check_parity`. Outputs are named "logits (NAME)", "logits
    (id -1)" and "logits (mixed rows)". Raises UserError where model, adapters or base are at fault.
    """
    begin = time.perf_counter()
    model = Path(model)
    known = read_swappable(model).slots
    if set(known) != set(adapters):
        raise UserError(
            f"{model} holds the adapters {some(known) or '(none: it is no grouped model)'}, and was to be compared "
            f"with {some(adapters)}. Name all of its own, and no other: --adapters NAME=PATH ..."
        )
    adapters = {name: adapters[name] for name in known}
    graph = load_graph(model)
    dtype = model_dtype(graph)
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    outputs = tuple(value.name or "" for value in graph.graph.outputs)
    del graph

    batches: list[Inputs] = []
    expected: list[list[Outputs]] = []  # by adapter, the base last, then by batch
    base_off: list[list[Outputs]] = []
    for name, path in adapters.items():
        step(f"running PyTorch with {name}")
        reference = _reference(path, base_model, dtype)
        batches = batches or default_inputs(reference)
        expected.append([run_torch(reference, batch) for batch in batches])
        base_off.append([run_torch(reference, batch, adapter_on=False) for batch in batches])
        del reference
    step("running PyTorch with the base")
    base = _bare(next(iter(adapters.values())), base_model, dtype)
    expected.append([run_torch(base, batch) for batch in batches])

    masks = [padding_mask(batch) for batch in batches]
    # Each adapter alone, the base alone, and all of them side by side in every batch.
    slots = [*range(len(adapters)), -1]
    names = [*adapters, "id -1", "mixed rows"]
    plans = [_ids(batches, plan) for plan in (*([slot] for slot in slots), slots)]
    fed = [batch | {ADAPTER_IDS: rows} for ids in plans for batch, rows in zip(batches, ids, strict=True)]
    runs: dict[str, list[Outputs] | UserError] = {}
    for library, variant in ((True, VARIANTS[0]), (False, VARIANTS[1])):
        step(f"running ONNX Runtime {variant}")
        runs[variant] = run_batches(model, fed, outputs, library=library)
    worked = [ran for ran in runs.values() if isinstance(ran, list)]
    if not worked:
        raise next(ran for ran in reversed(runs.values()) if isinstance(ran, UserError))

    checks: list[Check] = []

    def add(found: Sequence[Check], name: str) -> None:
        checks.extend(dataclasses.replace(check, output=f"{check.output} ({name})") for check in found)

    def part(ran: list[Outputs], number: int) -> list[Outputs]:
        return ran[number * len(batches) : (number + 1) * len(batches)]

    for variant, ran in runs.items():
        for number, ids in enumerate(plans):
            own = ran if isinstance(ran, UserError) else part(ran, number)
            right = _pick(expected, ids, outputs)
            add(parity_checks(variant, own, outputs, right, masks, tolerance), names[number])
    for number, name in enumerate(adapters):
        own = part(worked[0], number)
        add(effect_checks(own, outputs, expected[number], base_off[number], masks, tolerance), name)
    failed = any(check.status == "failed" for check in checks)
    return ParityReport(
        model=str(model),
        adapter=", ".join(f"{name}={path}" for name, path in adapters.items()),
        dtype=dtype,
        tolerance=tolerance,
        checks=tuple(checks),
        layers=(),
        layers_variant=VARIANTS[0],
        layers_skipped=0,
        layers_reason="to see which layer drifts, export the adapter that fails on its own" if failed else "",
        inputs=tuple({name: tuple(value.shape) for name, value in batch.items()} for batch in fed),
        versions=versions(),
        seconds=time.perf_counter() - begin,
    )


def _reference(adapter: str | Path, base_model: str | Path | None, dtype: str) -> BaseModel:
    return load_reference(read_adapter(adapter), base_model, dtype=dtype)


def _bare(adapter: str | Path, base_model: str | Path | None, dtype: str) -> BaseModel:
    """The base without any adapter, rounded to `dtype`; parameters that it has no values of its own for are zero."""
    import torch

    base = load_base(read_adapter(adapter), base_model, dtype="float32")
    for name, parameter in base.model.named_parameters():
        if name in base.untrained:
            parameter.data.zero_()
    base.model.to(getattr(torch, dtype)).float()
    return base


def _ids(batches: Sequence[Inputs], slots: Sequence[int]) -> list[NDArray[np.int64]]:
    """adapter_ids by batch: `slots` in turn, going on from batch to batch."""
    rows, ids = 0, []
    for batch in batches:
        count = len(next(iter(batch.values())))
        ids.append(np.array([slots[(rows + row) % len(slots)] for row in range(count)], np.int64))
        rows += count
    return ids


def _pick(
    expected: Sequence[Sequence[Outputs]], ids: Sequence[NDArray[np.int64]], names: Sequence[str]
) -> list[Outputs]:
    """By batch, each row's outputs from the run with its own adapter; -1 is the last."""
    return [
        {name: np.stack([expected[slot][number][name][row] for row, slot in enumerate(rows)]) for name in names}
        for number, rows in enumerate(ids)
    ]
