"""The contract between a swappable model and its adapters: which graph inputs take which weights of an adapter.

A swappable export writes it into loratrf.json, `--onto` and `AdapterSession` hold adapters against it. numpy alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import LayerAdapter
from ..errors import UserError, some
from .manifest import MANIFEST, file_sha256, read_manifest

__all__ = [
    "DEFAULTS",
    "LAYER_PARTS",
    "RuntimeWeight",
    "Swappable",
    "check_matches",
    "layer_weights",
    "read_swappable",
    "zeros",
]

DEFAULTS = ("base", "adapter")
"""What a swappable model computes when no adapter is given."""

LAYER_PARTS = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "tau": "trf_tau",
    "C": "trf_C.weight",
    "D": "trf_D.weight",
}
"""Operator input -> what its weight is called within the module, as in adapter files."""

_DTYPES = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class RuntimeWeight:
    """A graph input that takes a weight of the adapter.

    `part` is A, B, tau, C or D of the adapted layer `module` (B and D with their scales folded in), or the name of a
    parameter of the saved module `module`, `transposed` where the graph keeps it (K,N). `shape` has numbers, and
    symbols where any size is taken: "<module>.R" and "<module>.F". `default` says whose values the graph's initializer
    holds: the "base" model's or the first "adapter"'s.
    """

    name: str
    module: str
    part: str
    shape: tuple[int | str, ...]
    dtype: str
    transposed: bool = False
    default: str = "base"

    @property
    def in_layer(self) -> bool:
        """Whether it belongs to an adapted layer; otherwise to a module that is saved whole."""
        return self.part in LAYER_PARTS

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def layer_weights(layer: LayerAdapter, parts: Iterable[str], dtype: str, default: str) -> list[RuntimeWeight]:
    """The run-time weights of one adapted layer of the graph, those in `parts`, with the layer's own sizes."""
    rank, filter_rank = f"{layer.name}.R", f"{layer.name}.F"
    # One symbol per layer: ONNX Runtime plans memory by symbols, and layers may differ in rank.
    shapes: dict[str, tuple[Any, ...]] = {
        "A": (rank, layer.in_features),
        "B": (layer.out_features, rank),
        "tau": (layer.out_features,),
        "C": (filter_rank, layer.out_features),
        "D": (layer.out_features, filter_rank),
    }
    return [
        RuntimeWeight(f"{layer.name}.{LAYER_PARTS[part]}", layer.name, part, shapes[part], dtype, default=default)
        for part in parts
    ]


def zeros(weight: RuntimeWeight) -> NDArray[Any]:
    """The weight of an adapted layer that changes nothing: every part zero, at rank 1."""
    return np.zeros([1 if isinstance(dim, str) else dim for dim in weight.shape], _DTYPES[weight.dtype])


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
        if value.dtype != _DTYPES[weight.dtype]:
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


@dataclass(frozen=True)
class Swappable:
    """What a swappable model says of itself: its run-time weights, and what adapters are held against.

    `slots` are empty but for a grouped model: there they are its adapters' slots by name, and the graph takes each of
    `weights` with a leading dimension of slots (`slots.Slots`).
    """

    model: Path
    default: str
    weights: tuple[RuntimeWeight, ...]
    filter_input: str
    manifest: dict[str, Any]
    slots: dict[str, int]


def read_swappable(model: str | Path) -> Swappable:
    """The contract of the swappable `model`, from the loratrf.json beside it.

    Raises UserError where there is none, it describes another file, or the model wasn't exported with --swappable.
    """
    model = Path(model)
    if not model.is_file():
        raise UserError(f"No model at {model}: expected a model.onnx of loratrf-export --swappable.")
    path = model.with_name(MANIFEST)
    if not path.is_file():
        raise UserError(f"{model} has no {MANIFEST} beside it, which says what adapters it takes. Keep them together.")
    manifest = read_manifest(path)
    facts = manifest.get("swappable")
    if facts is None:
        raise UserError(f"{model} takes no adapters at run time. Export it with --swappable base (or adapter).")
    weights = _read_weights(facts.get("weights")) if isinstance(facts, dict) else None
    slots = facts.get("slots", {}) if isinstance(facts, dict) else {}
    if (
        weights is None
        or not isinstance(slots, dict)
        or list(slots.values()) != list(range(len(slots)))
        or facts.get("default") not in DEFAULTS
    ):
        raise UserError(f"{path} is damaged: swappable is not what loratrf-export writes. Export the model again.")
    if (manifest["model"] or {}).get("sha256") != file_sha256(model):
        raise UserError(
            f"{model} is not the file that {path.name} describes: it was changed or replaced after the export. Export "
            "it again."
        )
    filter_input = str(manifest["adapter"].get("filter_input"))
    return Swappable(model, facts["default"], tuple(weights), filter_input, manifest, slots)


def _read_weights(entries: Any) -> list[RuntimeWeight] | None:
    """The run-time weights that a manifest lists, None where they are not what an export writes."""
    if not isinstance(entries, list):
        return None
    weights = []
    for entry in entries:
        try:
            weight = RuntimeWeight(**{**entry, "shape": tuple(entry["shape"])})
        except (TypeError, KeyError):
            return None
        texts = (weight.name, weight.module, weight.part, weight.dtype)
        dims = all(
            re.fullmatch(r".+\.[RF]", dim) if isinstance(dim, str) else type(dim) is int and dim > 0
            for dim in weight.shape
        )
        if not (
            all(isinstance(text, str) for text in texts)
            and dims
            and weight.dtype in _DTYPES
            and type(weight.transposed) is bool
            and weight.default in DEFAULTS
        ):
            return None
        weights.append(weight)
    return weights
