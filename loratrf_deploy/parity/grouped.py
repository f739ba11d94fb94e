"""Does a grouped model compute, row by row, what PyTorch computes with that row's adapter? In five steps too."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..errors import UserError, some
from ..formats.embedding import SENTENCE_EMBEDDING, Embedding
from ..formats.manifest import Swappable, check_described, read_swappable
from ..formats.tasks import label_count, part_of
from ..genai.generate import decoder_config
from ..ops.dtypes import DType
from ..ops.schemas import ADAPTER_IDS
from ..pytorch.base import BaseModel, Inputs, Outputs
from ..pytorch.embedding import as_embedder
from ..pytorch.oracle import bare_reference, load_reference, run_torch
from ..pytorch.shared import named_as
from .case import adapter_of, embedding_of, load_graph, model_dtype, output_names, tolerance_of
from .checks import Masks, effect_checks, parity_checks
from .greedy import Greedy, check_greedy_rows, torch_greedy
from .inputs import default_inputs, padding_mask
from .onnx_runs import Run, run_batches, without_room
from .quantised import dequantise_reference, exact_arithmetic
from .result import LIBRARY, WITH_LIBRARY, Check, ParityReport, Step, Variant, versions
from .rounding import rounding_checks

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["check_grouped_parity"]


@dataclass(frozen=True)
class _Case:
    """A grouped model, what its loratrf.json says of it, its adapters in the order of their slots, and what it gives.

    `genai_config` is there where the model generates, `embedding` where it gives one. Where its base is `quantised`,
    `graph` computes in float32.
    """

    model: Path
    swappable: Swappable
    graph: ir.Model
    genai_config: dict[str, Any] | None
    embedding: Embedding | None
    quantised: bool
    adapters: dict[str, Adapter]
    base_model: str | Path | None
    dtype: DType
    tolerance: float
    trust_remote_code: bool
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _TorchOutputs:
    """Of the same `batches`: by adapter, the bare base last, with the adapter `on` and with its layers `off`; its task.

    Of a model that generates, `greedy` has the tokens of each, the bare base's last, after a prompt of its own. Where
    the base is quantised, `weight_checks` say whether the graph's weights are its own.
    """

    batches: Sequence[Inputs]
    tasks: Sequence[str]
    on: Sequence[Sequence[Outputs]]
    off: Sequence[Sequence[Outputs]]
    greedy: Sequence[Greedy]
    weight_checks: Sequence[Check]


@dataclass(frozen=True)
class _Plan:
    """Which slot each row of each batch takes; -1 is the base."""

    name: str
    ids: Sequence[NDArray[np.int64]]


def check_grouped_parity(
    model: str | Path,
    adapters: Mapping[str, Adapter | str | Path],
    base_model: str | Path | None = None,
    *,
    tolerance: float | None = None,
    trust_remote_code: bool = False,
    step: Step = lambda text: None,
) -> ParityReport:
    """For each row, max|onnx - torch| / max|torch| <= tolerance, torch being PEFT with the adapter of that row alone.

    `adapters` (name -> folder, or what `read_adapter` gave) are all of the model's, by its own names. Every batch runs
    with each adapter on all rows, with the base on all rows (id -1) and with adapters and base mixed, with the library
    and without; and each adapter must make a difference to the base, as in `check_parity`. Outputs are named "logits
    (NAME)", "logits (id -1)" and "logits (mixed rows)". A causal language model also generates: one batch with a row
    for each adapter and one for the base, held against what PyTorch generates for each alone. A quantised base is
    compared as in `check_parity`, which also tells what `trust_remote_code` is. Raises UserError where model, adapters
    or base are at fault.
    """
    begin = time.perf_counter()
    case = _prepare(Path(model), adapters, base_model, tolerance, trust_remote_code)
    expected = _run_pytorch(case, step)
    plans = _plans(case, expected.batches)
    runs = _run_onnx(case, expected.batches, plans, step)
    checks = _judge(case, expected, plans, runs)
    if case.quantised:
        step("rounding to int8")
        checks += _rounding(case, expected, plans[-1], library=isinstance(runs[WITH_LIBRARY][0], list))
    if case.genai_config is not None:
        step("generating")
        rows = dict(zip([*case.adapters, "id -1"], expected.greedy, strict=True))
        checks += check_greedy_rows(case.model, case.graph, case.genai_config, rows, case.tolerance)
    failed = any(check.status == "failed" for check in checks)
    shapes = [{name: tuple(value.shape) for name, value in batch.items()} for batch in expected.batches]
    return ParityReport(
        model=str(model),
        adapter=", ".join(
            f"{name} ({task})={adapter.path}" if case.swappable.tasks else f"{name}={adapter.path}"
            for (name, adapter), task in zip(case.adapters.items(), expected.tasks, strict=True)
        ),
        dtype=case.dtype,
        tolerance=case.tolerance,
        checks=tuple(checks),
        layers=(),
        layers_variant=WITH_LIBRARY,
        layers_skipped=0,
        layers_reason="to see which layer drifts, export the adapter that fails on its own" if failed else "",
        inputs=tuple(
            own | {ADAPTER_IDS: ids.shape} for plan in plans for own, ids in zip(shapes, plan.ids, strict=True)
        ),
        versions=versions(),
        seconds=time.perf_counter() - begin,
    )


def _prepare(
    model: Path,
    adapters: Mapping[str, Adapter | str | Path],
    base_model: str | Path | None,
    tolerance: float | None,
    trust_remote_code: bool,
) -> _Case:
    _, swappable = read_swappable(model)
    known = swappable.slots
    if set(known) != set(adapters):
        raise UserError(
            f"{model} holds the adapters {some(known) or '(none: it is no grouped model)'}, and was to be compared "
            f"with {some(adapters)}. Name all of its own, and no other: --adapters NAME=PATH ..."
        )
    graph = load_graph(model)
    check_described(model)
    dtype, genai_config, embedding = model_dtype(graph), decoder_config(model), embedding_of(model, graph)
    loaded = {name: adapter_of(adapters[name]) for name in known}
    if embedding is not None:
        loaded = {name: as_embedder(adapter) for name, adapter in loaded.items()}
    return _Case(
        model=model,
        swappable=swappable,
        graph=graph,
        genai_config=genai_config,
        embedding=embedding,
        quantised=exact_arithmetic(graph),
        adapters=loaded,
        base_model=base_model,
        dtype=dtype,
        tolerance=tolerance_of(dtype, generates=bool(genai_config)) if tolerance is None else tolerance,
        trust_remote_code=trust_remote_code,
        outputs=output_names(graph),
    )


def _run_pytorch(case: _Case, step: Step) -> _TorchOutputs:
    batches: list[Inputs] = []
    on, off, greedy = [], [], list[Greedy]()
    tasks, by_task = list[str](), dict[str, list[Adapter]]()
    for name, adapter in case.adapters.items():
        step(f"running PyTorch with {name}")
        reference = load_reference(adapter, case.base_model, dtype=case.dtype, trust_remote_code=case.trust_remote_code)
        tasks.append(reference.task)
        by_task.setdefault(reference.task, []).append(adapter)
        batches = batches or default_inputs(dataclasses.replace(reference, embedding=case.embedding))
        _dequantise(case, reference, adapter)
        on.append([_torch(case, reference, batch) for batch in batches])
        off.append([_torch(case, reference, batch, adapter_on=False) for batch in batches])
        greedy += _generate(case, reference, row=len(greedy))
        del reference  # its memory is the next one's
    step("running PyTorch with the base")
    bare: list[Outputs] = [{} for _ in batches]
    weight_checks: list[Check] = []
    for adapters in by_task.values():
        most = max(adapters, key=lambda adapter: label_count(adapter) or 0)
        base = bare_reference(most, case.base_model, dtype=case.dtype, trust_remote_code=case.trust_remote_code)
        weight_checks += _dequantise(case, base, most)
        for outputs, batch in zip(bare, batches, strict=True):
            outputs |= _torch(case, base, batch)
        greedy += _generate(case, base, row=len(greedy))
    on.append(bare)
    if unknown := sorted(set(case.outputs).difference(*(by_batch[0] for by_batch in on))):
        raise UserError(
            f"{case.model} gives {', '.join(case.outputs)}, and PyTorch's models of its adapters have no counterpart "
            f"for {', '.join(unknown)}. Expected a model that loratrf-export made for the same tasks."
        )
    return _TorchOutputs(batches, tasks, on, off, greedy, weight_checks)


def _torch(case: _Case, reference: BaseModel, batch: Inputs, *, adapter_on: bool = True) -> Outputs:
    """What a reference gives for `batch`, by the graph's names."""
    part = part_of(reference.task, case.swappable.tasks, reference.path)
    if part is None or SENTENCE_EMBEDDING in part.outputs:
        reference = dataclasses.replace(reference, embedding=case.embedding)
    return named_as(run_torch(reference, batch, adapter_on=adapter_on), part)


def _dequantise(case: _Case, reference: BaseModel, adapter: Adapter) -> list[Check]:
    """Gives a reference the graph's own weights where these are quantised; the check that they are the model's own."""
    if not case.quantised:
        return []
    part = part_of(reference.task, case.swappable.tasks, reference.path)
    named = functools.partial(part.path, trunk=case.swappable.trunk) if part else str
    return [dequantise_reference(case.graph, reference, adapter, merged=False, named=named, saved=False)]


def _generate(case: _Case, reference: BaseModel, row: int) -> list[Greedy]:
    """What a reference generates by itself, with the prompt of `row`; nothing where the model doesn't generate."""
    return [torch_greedy(reference.model, case.genai_config, row)] if case.genai_config is not None else []


def _plans(case: _Case, batches: Sequence[Inputs]) -> list[_Plan]:
    """Each adapter alone, the base alone, and all of them side by side in every batch."""
    slots = [*range(len(case.adapters)), -1]
    names = [*case.adapters, "id -1", "mixed rows"]
    chosen: list[list[int]] = [*([slot] for slot in slots), slots]
    return [_Plan(name, _ids(batches, own)) for name, own in zip(names, chosen, strict=True)]


def _ids(batches: Sequence[Inputs], slots: Sequence[int]) -> list[NDArray[np.int64]]:
    """adapter_ids by batch: `slots` in turn, going on from batch to batch."""
    rows, ids = 0, []
    for batch in batches:
        count = len(next(iter(batch.values())))
        ids.append(np.array([slots[(rows + row) % len(slots)] for row in range(count)], np.int64))
        rows += count
    return ids


def _run_onnx(case: _Case, batches: Sequence[Inputs], plans: Sequence[_Plan], step: Step) -> dict[Variant, list[Run]]:
    """By variant, what each plan gave. Raises UserError where ONNX Runtime runs the model neither way."""
    graph = case.graph if case.quantised else None
    fed = [batch | {ADAPTER_IDS: ids} for plan in plans for batch, ids in zip(batches, plan.ids, strict=True)]
    runs: dict[Variant, list[Run]] = {}
    refusals = []
    for variant, library in LIBRARY.items():
        step(f"running ONNX Runtime {variant}")
        ran = run_batches(case.model, fed, case.outputs, library, graph=graph)
        if isinstance(ran, UserError):
            refusals.append(ran)
            runs[variant] = [ran for _ in plans]
        else:
            runs[variant] = [ran[at : at + len(batches)] for at in range(0, len(ran), len(batches))]
    if len(refusals) == len(runs):
        raise refusals[-1]
    return runs


def _judge(
    case: _Case, expected: _TorchOutputs, plans: Sequence[_Plan], runs: Mapping[Variant, Sequence[Run]]
) -> list[Check]:
    checks: list[Check] = []

    def add(found: Sequence[Check], name: str) -> None:
        checks.extend(dataclasses.replace(check, output=f"{check.output} ({name})") for check in found)

    for variant, by_plan in runs.items():
        for plan, run in zip(plans, by_plan, strict=True):
            for name in case.outputs:
                if isinstance(run, UserError):
                    add(parity_checks(variant, run, [name], [], [], case.tolerance), plan.name)
                elif (rows := _rows(run, expected.on, plan, expected.batches, name)).right:
                    add(parity_checks(variant, rows.got, [name], rows.right, rows.masks, case.tolerance), plan.name)
    worked = next(by_plan for by_plan in runs.values() if isinstance(by_plan[0], list))
    for plan, run in list(zip(plans, worked, strict=True))[: len(case.adapters)]:
        assert isinstance(run, list)
        for name in case.outputs:
            rows, off = (_rows(run, sides, plan, expected.batches, name) for sides in (expected.on, expected.off))
            if rows.right:
                add(effect_checks(rows.got, [name], rows.right, off.right, rows.masks, case.tolerance), plan.name)
    return [*checks, *expected.weight_checks]


def _rounding(case: _Case, expected: _TorchOutputs, mixed: _Plan, *, library: bool) -> list[Check]:
    """The file's own int8 products, on mixed rows."""
    fed = [batch | {ADAPTER_IDS: ids} for batch, ids in zip(expected.batches, mixed.ids, strict=True)]

    def against(run: list[Outputs], name: str) -> tuple[list[Outputs], list[Outputs], Masks]:
        rows = _rows(run, expected.on, mixed, expected.batches, name)
        return rows.got, rows.right, rows.masks

    return [
        check if check.output == "products" else dataclasses.replace(check, output=f"{check.output} ({mixed.name})")
        for check in rounding_checks(case.model, fed, case.outputs, against, None, library=library)
    ]


@dataclass(frozen=True)
class _Rows:
    """An output's rows, each a batch of one: what ONNX Runtime and PyTorch gave, and which of its tokens count."""

    got: list[Outputs]
    right: list[Outputs]
    masks: list[NDArray[np.bool_] | None]


def _rows(
    run: Sequence[Outputs],
    expected: Sequence[Sequence[Outputs]],
    plan: _Plan,
    batches: Sequence[Inputs],
    name: str,
) -> _Rows:
    """The output `name` of the rows whose adapter, or the base (-1, the last), gives it, with the labels that it has.

    What the run gives for further labels is left away where it is the lowest number, as it must be.
    """
    rows = _Rows([], [], [])
    for number, (ids, batch) in enumerate(zip(plan.ids, batches, strict=True)):
        mask = padding_mask(batch)
        for row, slot in enumerate(ids):
            if name not in expected[slot][number]:
                continue
            right, got = expected[slot][number][name][row : row + 1], run[number][name][row : row + 1]
            rows.right.append({name: right})
            rows.got.append({name: without_room(got, right.shape[-1])})
            rows.masks.append(None if mask is None else mask[row : row + 1])
    return rows
