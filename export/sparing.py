"""Which layers stay in float32, so that int8 changes no more of a user's own answers than they allow."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..errors import UserError
from ..ops.library import is_built
from ..parity.evaluation import OUTPUT, check_classifies
from ..parity.inputs import read_inputs
from ..parity.onnx_runs import run_session, session_in_memory
from ..pytorch.base import BaseModel, Inputs
from .options import ExportOptions
from .quantise import quantisable, quantise

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["spared"]

_WEIGHED = 64
"""Rows on which each layer is weighed alone; what is counted is counted on all of them."""


def spared(
    program: ir.Model,
    adapter: Adapter,
    base: BaseModel,
    folder: Path,
    options: ExportOptions,
    weights: Mapping[str, NDArray[Any]],
) -> tuple[str, ...]:
    """The fewest layers to keep in float32 for `options.max_loss`, as patterns for `quantise`; `keep_float` among them.

    1. e² = Σ(q-f)² of each layer: q the logits with it alone in int8, f those in float32, on the first rows.
    2. Those with the largest e² for each of their weights stay in float32, as many as it takes until no more than
       max_loss % of the answers to all rows are others than in float32; the number is halved in on.

    `program` is the graph in float32, `folder` has the tokenizer, `weights` are an adapter's where they are inputs.
    Raises UserError where there is nothing left to quantise.
    """
    assert options.evaluate is not None
    assert options.max_loss is not None
    check_classifies(base.task)
    batches = read_inputs(options.evaluate, base, folder)
    with tempfile.TemporaryDirectory(prefix="loratrf-") as name:
        trial = _Trial(program, Path(name) / "float32.onnx", adapter, base, weights)
        units = trial.units(options.keep_float)
        few = _first(batches, _WEIGHED)
        exact, exact_few = trial.logits(None, batches), trial.logits(None, few)

        def loss(unit: tuple[list[str], int]) -> float:
            alone, size = unit
            keep = [*options.keep_float, *(name for names, _ in units if names is not alone for name in names)]
            return float(((trial.logits(keep, few) - exact_few) ** 2).sum() / size)

        units = sorted(units, key=loss, reverse=True)

        def kept(count: int) -> tuple[str, ...]:
            return (*options.keep_float, *(name for names, _ in units[:count] for name in names))

        allowed = int(options.max_loss / 100 * len(exact))
        low, high = 0, len(units)
        while low < high:
            middle = (low + high) // 2
            changed = np.count_nonzero(trial.logits(kept(middle), batches).argmax(-1) != exact.argmax(-1))
            low, high = (low, middle) if changed <= allowed else (middle + 1, high)
    if low == len(units):
        raise UserError(
            f"--max-loss {options.max_loss:g} allows {allowed} of the {len(exact)} answers of {options.evaluate.name} "
            "to change, and no layer can be in int8 for that. Allow more, give more rows, or leave --quantize out."
        )
    return kept(low)


class _Trial:
    """A graph in float32 on disk, of which variants run with some layers in int8."""

    def __init__(
        self, program: ir.Model, file: Path, adapter: Adapter, base: BaseModel, weights: Mapping[str, NDArray[Any]]
    ):
        import onnx_ir as ir

        ir.save(program, file, external_data=f"{file.name}.data")
        self._file, self._saved, self._base, self._weights = file, adapter.modules_to_save, base, weights

    def units(self, patterns: Sequence[str]) -> list[tuple[list[str], int]]:
        """The layers that can be in int8, those of one product together, with their number of weights."""
        return quantisable(self._load(), self._saved, patterns, self._base.model)

    def logits(self, keep: Sequence[str] | None, batches: Sequence[Inputs]) -> NDArray[Any]:
        """(rows, classes) of all batches, with the layers `keep` in float32; None, with all of them."""
        graph = self._load()
        if keep is not None:
            quantise(graph, self._saved, keep, self._base.model)
        session = session_in_memory(graph, self._file, library=is_built())
        return np.concatenate([run_session(session, batch, [OUTPUT], self._weights)[OUTPUT] for batch in batches])

    def _load(self) -> ir.Model:
        import onnx_ir as ir

        return ir.load(self._file)


def _first(batches: Sequence[Inputs], rows: int) -> list[Inputs]:
    """As many batches as it takes for so many rows."""
    chosen: list[Inputs] = []
    for batch in batches:
        if sum(len(next(iter(own.values()))) for own in chosen) >= rows:
            break
        chosen.append(batch)
    return chosen
