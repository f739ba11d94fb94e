"""The contract between a model and its run-time adapters: which graph inputs take which weights of an adapter.

An export writes it into loratrf.json (`manifest`), `--onto` and `AdapterSession` hold adapters against it. numpy alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import LayerAdapter
from ..errors import UserError, some
from ..ops.dtypes import NUMPY, RUN_TIME_DTYPES, DType
from ..ops.schemas import MAX_RANK

__all__ = [
    "LAYER_PARTS",
    "OPERATOR_PARTS",
    "TABLE_PARTS",
    "Default",
    "RuntimeWeight",
    "check_matches",
    "largest_file",
    "layer_weights",
    "neutral",
]

Default = Literal["base", "adapter", "required"]
"""What a swappable model computes when no adapter is given; "required": nothing, every run names one."""

_MOST_VALUES = 2**32
"""Of one weight: twice what the largest vocabularies have in embeddings and heads."""
_MOST_FEATURES = 2**24
"""Of an adapted layer: a vocabulary is the most that any has, and sixty times smaller."""
_MOST_OF_A_HEAD = 2**28
"""Values of a head's weight: 65,536 labels of a state 4,096 wide."""

OPERATOR_PARTS = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "tau": "trf_tau",
    "C": "trf_C.weight",
    "D": "trf_D.weight",
}
"""Operator input -> what its weight is called within the module, as in adapter files."""
LAYER_PARTS = {**OPERATOR_PARTS, "gain": "lora_gain", "offset": "lora_offset"}
"""The same of all that an adapted layer may have: h becomes gain⊙h + offset before the operator (DoRA)."""
TABLE_PARTS = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
"""The same of an embedding table, whose parts these are all."""


@dataclass(frozen=True)
class RuntimeWeight:
    """A graph input that takes a weight of the adapter.

    `part` is A, B, tau, C, D, gain or offset of the adapted layer `module` (B and D with their scales folded in), or
    the name of a parameter of the saved module `module`, `transposed` where the graph keeps it (K,N). `shape` has
    numbers, and symbols where any size is taken: "<module>.R" and "<module>.F". `default` says whose values the graph's
    initializer holds: the "base" model's or the first "adapter"'s; "required", there is none. Where it is of the head
    of one `task` of several, adapters of others have zeros there. Its rows are `labels` where an adapter may have fewer
    (`tasks.padded`). Raises ValueError for what no export writes.
    """

    name: str
    module: str
    part: str
    shape: tuple[int | str, ...]
    dtype: DType
    transposed: bool = False
    default: Default = "base"
    task: str | None = None
    labels: bool = False

    def __post_init__(self) -> None:
        sizes = (re.fullmatch(r".+\.[RF]", dim) if isinstance(dim, str) else dim > 0 for dim in self.shape)
        numbers = [dim for dim in self.shape if not isinstance(dim, str)]
        if not all(sizes) or math.prod(numbers) > _MOST_VALUES or self.dtype not in RUN_TIME_DTYPES.values():
            raise ValueError(self.name)
        # `neutral` makes these without having seen an adapter: one size is the layer's, the other a rank.
        dims = 1 if self.part in ("tau", "gain", "offset") else 2
        if self.in_layer and (len(numbers) != 1 or len(self.shape) != dims or numbers[0] > _MOST_FEATURES):
            raise ValueError(self.name)
        # `fit` makes these without having seen a head of the task, or one of so many labels.
        if (self.task or self.labels) and (len(numbers) < len(self.shape) or math.prod(numbers) > _MOST_OF_A_HEAD):
            raise ValueError(self.name)

    @property
    def in_table(self) -> bool:
        """Whether it belongs to an adapted embedding table."""
        return self.name == f"{self.module}.{TABLE_PARTS.get(self.part)}"

    @property
    def in_layer(self) -> bool:
        """Whether it belongs to an adapted layer; otherwise to a module that is saved whole."""
        return self.part in LAYER_PARTS


def layer_weights(layer: LayerAdapter, parts: Iterable[str], dtype: DType, default: Default) -> list[RuntimeWeight]:
    """The run-time weights of one adapted layer of the graph, those in `parts`, with the layer's own sizes."""
    rank, filter_rank = f"{layer.name}.R", f"{layer.name}.F"
    # One symbol per layer: ONNX Runtime plans memory by symbols, and layers may differ in rank.
    shapes: dict[str, tuple[Any, ...]] = {
        "A": (rank, layer.in_features),
        "B": (layer.out_features, rank),
        "tau": (layer.out_features,),
        "gain": (layer.out_features,),
        "offset": (layer.out_features,),
        "C": (filter_rank, layer.out_features),
        "D": (layer.out_features, filter_rank),
    }
    names = TABLE_PARTS if layer.embedding else LAYER_PARTS
    return [
        RuntimeWeight(f"{layer.name}.{names[part]}", layer.name, part, shapes[part], dtype, default=default)
        for part in parts
    ]


def neutral(weight: RuntimeWeight) -> NDArray[Any]:
    """The weight of an adapted layer that changes nothing: every part zero, at rank 1, but a gain of one."""
    shape = [1 if isinstance(dim, str) else dim for dim in weight.shape]
    return np.full(shape, 1 if weight.part == "gain" else 0, NUMPY[weight.dtype])


def largest_file(weights: Sequence[RuntimeWeight]) -> int:
    """Bytes that a file of `weights` has at most: at the highest rank, with room for names and tables."""
    values = (math.prod(MAX_RANK if isinstance(dim, str) else dim for dim in weight.shape) for weight in weights)
    return sum(4 * count for count in values) + sum(1000 + 4 * len(weight.name) for weight in weights) + (2 << 20)


def check_matches(values: Mapping[str, NDArray[Any]], weights: Sequence[RuntimeWeight], file: object) -> None:
    """Whether `values` are exactly `weights`: names, types, sizes, one size per symbol. UserError naming the rest."""
    problems = []
    names = {weight.name for weight in weights}
    if missing := [weight.name for weight in weights if weight.name not in values]:
        problems.append(f"it lacks {some(missing)}")
    if foreign := [name for name in values if name not in names]:
        problems.append(f"the model takes no {some(foreign)}")
    sizes: dict[str, int] = {}
    for weight in weights:
        value = values.get(weight.name)
        if value is None:
            continue
        if value.dtype != NUMPY[weight.dtype]:
            problems.append(f"{weight.name} is {value.dtype}, expected {weight.dtype}")
        fits = len(value.shape) == len(weight.shape) and all(
            got > 0 and got == (sizes.setdefault(dim, got) if isinstance(dim, str) else dim)
            for got, dim in zip(value.shape, weight.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(str(sizes.get(dim, dim)) if isinstance(dim, str) else str(dim) for dim in weight.shape)
            problems.append(f"{weight.name} is {value.shape}, expected ({expected})")
    if problems:
        raise UserError(
            f"{file} doesn't fit this model: {some(problems, '; ')}. Convert the adapter for it: loratrf-export "
            "--adapter PATH --onto model.onnx --out NAME.onnx_adapter."
        )
