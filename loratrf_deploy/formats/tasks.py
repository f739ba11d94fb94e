"""One model, adapters of several tasks: which outputs are whose, what modules are called where, and labels by name."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.json_text import parse_json
from ..errors import UserError, cut, one_line
from ..files import read_regular

__all__ = [
    *("HEADS", "TaskPart", "in_graph", "label_count", "label_layer", "label_names", "lowest", "padded", "part_of"),
]

V = TypeVar("V")

HEADS = ("classifier", "score", "qa_outputs", "classification_head")
"""What transformers calls the head of a model that classifies texts or their tokens."""
_LAYERS = ("out_proj", "", "1", "classifier")
"""Where in a head its last layer is."""
_CONFIG = "config.json"
_LONGEST = 1 << 20


@dataclass(frozen=True)
class TaskPart:
    """A task's part of a model that has several.

    `outputs` are the graph's, by the names that they have in the task's own class. An adapter calls a module of the
    shared trunk `trunk` + its path there, in the graph it is the model's own trunk + that path; any other module is of
    the task's head, and called `head` + its name in the graph. `lacks` are parameters of the shared trunk that the
    task's class has not, in its own words.
    """

    outputs: dict[str, str]
    trunk: str
    head: str
    lacks: tuple[str, ...] = ()

    def path(self, own: str, trunk: str) -> str:
        """What the graph, whose trunk is called `trunk`, calls a module that an adapter of the task calls `own`."""
        return trunk + own.removeprefix(self.trunk) if own.startswith(self.trunk) else self.head + own

    def own(self, parameters: Mapping[str, V], trunk: str) -> dict[str, V]:
        """Of the graph's `parameters` those of the task's class, by its own names."""
        found = {}
        for name, value in parameters.items():
            if name.startswith(trunk):
                found[self.trunk + name.removeprefix(trunk)] = value
            elif self.head and name.startswith(self.head):
                found[name.removeprefix(self.head)] = value
        return {name: value for name, value in found.items() if name not in self.lacks}


def in_graph(adapter: Adapter, part: TaskPart | None, trunk: str) -> Adapter:
    """`adapter` with its modules by their names in the graph; its config says what it said of its own."""
    if part is None:
        return adapter
    layers = {part.path(name, trunk): layer for name, layer in adapter.layers.items()}
    saved = {part.path(name, trunk): tensors for name, tensors in adapter.modules_to_save.items()}
    return replace(
        adapter, layers={name: replace(layer, name=name) for name, layer in layers.items()}, modules_to_save=saved
    )


def part_of(task: str | None, tasks: Mapping[str, TaskPart], what: object) -> TaskPart | None:
    """That of `task` in a model of several `tasks`; None in a model of one. UserError where it has no such task."""
    if not tasks:
        return None
    if task is not None and task in tasks:
        return tasks[task]
    raise UserError(
        f"The adapter {what} is for {task or 'a task that its config does not name'}, and the model was exported for "
        f"{', '.join(tasks)}. Export a model for its task, or set the right task_type in its adapter_config.json."
    )


def label_layer(adapter: Adapter, heads: Collection[str] = HEADS) -> str | None:
    """The saved layer whose rows are the labels, such as classifier.out_proj; None where the adapter brings none of
    `heads`."""
    for path, tensors in adapter.modules_to_save.items():
        if path.rpartition(".")[2] in heads:
            for layer in _LAYERS:
                inner = f"{layer}." if layer else ""
                if f"{inner}weight" in tensors:
                    return f"{path}.{layer}".removesuffix(".")
    return None


def label_count(adapter: Adapter, heads: Collection[str] = HEADS) -> int | None:
    """The number of labels of the one of `heads` that the adapter brings, None where it brings none."""
    layer = label_layer(adapter, heads)
    for path, tensors in adapter.modules_to_save.items():
        for name, value in tensors.items():
            if f"{path}.{name}" == f"{layer}.weight":
                return int(value.shape[0])
    return None


def label_names(adapter: Adapter, task: str, known: Mapping[Any, Any] | None = None) -> tuple[str, ...] | None:
    """What the labels of an adapter that classifies are called, in their order; None where its `task` has none.

    The id2label in a config.json beside the adapter says it, else `known`, the base's, where it has as many; else they
    are LABEL_0 and so on, as in transformers. Without a head of its own the adapter has the base's, if that is `known`.
    Raises UserError for a config.json that can't be read.
    """
    count = label_count(adapter)
    count = len(known) if count is None and known else count
    if count is None or not task.endswith("-classification"):
        return None
    for names in (_beside(adapter.path), known or {}):
        by_id = {str(number): name for number, name in names.items()}
        found = [by_id.get(str(number)) for number in range(count)]
        if len(by_id) == count and all(isinstance(name, str) for name in found):
            return tuple(map(str, found))
    return tuple(f"LABEL_{number}" for number in range(count))


def _beside(folder: Path) -> Mapping[str, Any]:
    path = folder / _CONFIG
    if not os.path.lexists(path):
        return {}
    raw = read_regular(path, folder, _LONGEST)
    try:
        config = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}, which may name the adapter's labels, is not valid JSON ({cut(one_line(str(error)), 200)}). Save "
            "it again, or remove it."
        ) from error
    names = config.get("id2label") if isinstance(config, dict) else None
    return names if isinstance(names, dict) else {}


def lowest(dtype: Any) -> Any:
    """What stands for labels beyond an adapter's own: softmax makes 0 of it, and argmax never finds it."""
    return np.finfo(dtype).min


def padded(value: NDArray[Any], rows: int, dtype: Any) -> NDArray[Any]:
    """A head's weight (N,K) or bias (N) with `rows` labels: those beyond its own give the lowest finite number."""
    missing = rows - len(value)
    if value.ndim == 1:
        return np.concatenate([value, np.full(missing, lowest(dtype), value.dtype)])
    return np.concatenate([value, np.zeros((missing, *value.shape[1:]), value.dtype)])
