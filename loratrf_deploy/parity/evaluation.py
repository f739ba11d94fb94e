"""What an export is worth on a user's own rows: its answers beside PyTorch's in float32, and beside the labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, some
from ..formats.tasks import label_names
from ..pytorch.oracle import load_reference, run_torch
from .case import Case
from .checks import over_batches
from .inputs import padding_mask, read_inputs, rows
from .onnx_runs import run_batches
from .result import EVALUATED, Check, Step

__all__ = ["OUTPUT", "check_classifies", "evaluate"]

OUTPUT = "logits"
"""Whose largest entry is a row's answer."""


def evaluate(
    case: Case,
    file: Path,
    base_model: str | Path | None,
    step: Step,
    *,
    max_loss: float | None = None,
    library: bool,
) -> Check:
    """On the rows of `file`: answers, argmax of the logits, that differ from PyTorch's; and shares that are right.

    Rows are those of `read_inputs`, with a "label" each, or in none: a number, or a name that the model's config has.
    PyTorch computes in float32 with the base's own weights, so what types and quantisation cost is seen here, and
    nowhere else in a proof; it is a figure and no failure, but where more than `max_loss` percent of the answers
    differ. Raises UserError for a model that doesn't classify whole
    rows, and for rows and labels at fault.
    """
    check_classifies(case.base.task)
    step("evaluating PyTorch")
    trusted = case.base.trust_remote_code
    reference = load_reference(case.adapter, base_model, trust_remote_code=trusted)
    batches = read_inputs(file, reference, case.model.parent)
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    known = label_names(case.adapter, case.base.task, reference.model.config.id2label) or ()
    labels = _labels(file, count, known)
    expected = [run_torch(reference, batch) for batch in batches]
    step("evaluating the export")
    run = run_batches(case.model, batches, (OUTPUT,), library, case.device, weights=case.weights)
    if isinstance(run, UserError):
        return Check(EVALUATED, OUTPUT, "failed", str(run))
    figures = over_batches(run, expected, OUTPUT, [padding_mask(batch) for batch in batches], 0.0)
    right, got = (np.concatenate([part[OUTPUT].argmax(-1) for part in parts]) for parts in (expected, run))
    differ = np.count_nonzero(right != got)
    reason = f"{differ} of {count} answers of {file.name} differ from PyTorch's in float32"
    if labels is not None:
        reason += f"; right are {np.mean(got == labels):.4f} of them, of PyTorch's {np.mean(right == labels):.4f}"
    if max_loss is not None and differ > max_loss / 100 * count:
        return Check(EVALUATED, OUTPUT, "failed", f"{reason}: more than --max-loss {max_loss:g} % of them", figures)
    return Check(EVALUATED, OUTPUT, "passed", reason, figures)


def check_classifies(task: str) -> None:
    """UserError for a model that doesn't classify whole rows."""
    if not task.endswith("-classification") or task == "token-classification":
        raise UserError(
            f"--evaluate counts answers of models that classify, and this one's task is {task}. Leave it out."
        )


def _labels(file: Path, count: int, known: Sequence[str]) -> NDArray[np.int64] | None:
    """Each row's label as a number; None where no row has one. Raises UserError naming the line."""
    names = {name: number for number, name in enumerate(known)}
    found: list[int] = []
    entries = list(rows(file))
    lines = [line for line, row in entries if row.get("label") is None]
    for line, row in entries:
        label = row.get("label")
        if label is None:
            continue
        number = label if type(label) is int else names.get(label) if isinstance(label, str) else None
        if number is None or not 0 <= number < len(known):
            raise UserError(
                f"{file}, line {line}: the label is {label!r}, expected 0 to {len(known) - 1} or one of "
                f"{some(list(names))}."
            )
        found.append(number)
    if found and len(found) != count:
        where = f"line {lines[0]} has none" if lines else "a line holds a batch of several rows"
        raise UserError(f"{file} has {len(found)} labels for {count} rows ({where}). Give every row one, or none.")
    return np.array(found) if found else None
