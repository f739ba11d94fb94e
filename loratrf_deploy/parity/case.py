"""The first step of a parity check: everything that is compared, read and held against each other."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..adapters.adapter import Adapter, read_adapter
from ..errors import UserError
from ..formats.embedding import SENTENCE_EMBEDDING, Embedding
from ..formats.fit import fit
from ..formats.images import EMBEDS, takes_images
from ..formats.manifest import MANIFEST, Manifest, Swappable, check_described, read_manifest, read_swappable
from ..formats.stages import CROSS, Stages, stages_of
from ..formats.swappable import LAYER_PARTS, TABLE_PARTS
from ..formats.tasks import TaskPart, in_graph, label_count, part_of
from ..genai.generate import decoder_config
from ..genai.names import POSITION_IDS, genai_name, is_cache
from ..onnx_file import check_external_data
from ..ops.dtypes import DTYPES, DType
from ..ops.schemas import ADAPTER_IDS, DOMAIN, FUNCTIONS, OPERATOR, Device
from ..pytorch.base import TASKS, BaseModel, Inputs
from ..pytorch.embedding import as_embedder
from ..pytorch.language import language_part
from ..pytorch.oracle import load_reference
from ..runtime.session import PROVIDERS, check_providers
from ..runtime.slots import Slots
from .images import image_batches, with_images
from .inputs import complete, default_inputs, padding_mask, read_inputs
from .quantised import dequantise_reference, exact_arithmetic
from .result import Check, Step

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

__all__ = [
    "TOLERANCES",
    "Case",
    "adapter_of",
    "embedding_of",
    "load_graph",
    "model_dtype",
    "output_names",
    "prepare",
    "tolerance_of",
]

TOLERANCES: dict[DType, float] = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest relative error, max|a-b| / max|b|, by dtype of the weights; bfloat16 is 8 times as coarse as float16."""

GENERATION_TOLERANCE = 1e-4
"""Of float32 models that generate: rounding adds up over many more layers than an encoder has."""

_LAYER_WEIGHTS = tuple(f".{part}" for part in (*LAYER_PARTS.values(), *TABLE_PARTS.values()))
"""How inputs end that take an adapter: with --swappable required no default tells them from others."""


@dataclass(frozen=True)
class Case:
    """An exported model, PyTorch's model of the same adapter, and what both are fed.

    `weights` are the adapter's for a swappable model, which `manifest` describes; both are empty otherwise. A grouped
    model has the adapter in the one slot of these weights; in one of several tasks `part` is that of the adapter's, and
    `outputs` are its own. `folded` layers have their low-rank half, or a bias of it, in the graph's weights.
    `genai_config` is there where the model generates with onnxruntime-genai, `stages` where it does so by itself:
    `graph` is the decoder's then. ONNX Runtime is `fed` the batches with what else its graph takes. Where the base is
    `quantised`, `graph` is the one in the file, made to compute in float32, `base` has its dequantised weights, and
    `weight_checks` say whether these are its own.
    """

    model: Path
    graph: ir.Model
    genai_config: dict[str, Any] | None
    stages: Stages | None
    dtype: DType
    tolerance: float
    device: Device
    adapter: Adapter
    base: BaseModel
    folded: frozenset[str]
    quantised: bool
    weight_checks: tuple[Check, ...]
    manifest: Manifest | None
    weights: dict[str, NDArray[Any]]
    batches: tuple[Inputs, ...]
    fed: tuple[Inputs, ...]
    masks: tuple[NDArray[np.bool_] | None, ...]
    outputs: tuple[str, ...]
    part: TaskPart | None

    @property
    def grouped(self) -> bool:
        """Whether rows name their slots in adapter_ids."""
        return bool(self.manifest and self.manifest.swappable and self.manifest.swappable.slots)

    @property
    def room(self) -> int:
        """For how many more labels than the adapter's a grouped model has room."""
        weights = self.manifest.swappable.weights if self.manifest and self.manifest.swappable else ()
        task, count = TASKS.get(self.adapter.task_type or ""), label_count(self.adapter)
        sizes = (weight.shape[0] for weight in weights if weight.labels and weight.task in (None, task))
        return max((size - count for size in sizes if isinstance(size, int) and count is not None), default=0)


def prepare(
    model: Path,
    adapter: Adapter | str | Path,
    base_model: str | Path | None,
    inputs: Sequence[Mapping[str, NDArray[Any]]] | Path | None,
    *,
    tolerance: float | None,
    device: Device,
    trust_remote_code: bool,
    step: Step,
) -> Case:
    """The case that `check_parity` was asked for, with its arguments. Raises UserError where one is at fault."""
    check_providers([PROVIDERS[device]])
    from ..pytorch.dora import with_gains

    step("reading the model")
    graph = load_graph(model)
    check_described(model)
    dtype, genai_config, stages = model_dtype(graph), decoder_config(model), stages_of(model)
    embedding = embedding_of(model, graph)
    read = adapter_of(adapter) if embedding is None else as_embedder(adapter_of(adapter))
    manifest, swappable = read_swappable(model) if _swaps(graph) else (None, None)
    task, trunk = TASKS.get(read.task_type or ""), swappable.trunk if swappable else ""
    part = part_of(task, swappable.tasks, read.path) if swappable else None
    step("loading PyTorch's model")
    graphs = [graph] if stages is None or stages.encoder is None else [graph, load_graph(stages.encoder)]
    folded = _folded(in_graph(read, part, trunk), graphs)
    if genai_config is not None:
        folded = {name for name in folded if genai_name(name)}  # of a vision tower nothing is in the graph
    base = load_reference(read, base_model, dtype=dtype, merge=bool(folded), trust_remote_code=trust_remote_code)
    if part is None or SENTENCE_EMBEDDING in part.outputs:
        base = replace(base, embedding=embedding)
    read = with_gains(read, base.model.get_base_model()) if not read.not_separable and not folded else read
    weight_checks = []
    if quantised := exact_arithmetic(graph):
        step("dequantising")
        merged, named = bool(folded or read.not_separable), partial(part.path, trunk=trunk) if part else str
        weight_checks = [
            dequantise_reference(
                graph, base, read, merged=merged, named=named, saved=not (swappable and swappable.slots)
            )
        ]
    weights = {}
    if manifest is not None and swappable is not None:
        own, _ = language_part(read, base.model.get_base_model())
        own = _as_taken(in_graph(own, part, trunk), swappable)
        weights = fit(own, swappable.weights, manifest.adapter.filter_input, task)
        if swappable.slots:
            slots = Slots(swappable.weights, 1)
            slots.put(0, weights)
            weights = slots.values
    images = takes_images(genai_config)
    batches = _batches(inputs, base, model, images=images)
    _check_names(model, graph, base, batches, weights)
    biased = {name for name, layer in read.layers.items() if layer.lora_bias is not None}
    return Case(
        model=model,
        graph=graph,
        genai_config=genai_config,
        stages=stages,
        dtype=dtype,
        tolerance=tolerance_of(dtype, generates=bool(genai_config or stages)) if tolerance is None else tolerance,
        device=device,
        adapter=read,
        base=base,
        folded=frozenset(folded | biased),
        quantised=quantised,
        weight_checks=tuple(weight_checks),
        manifest=manifest,
        weights=weights,
        batches=tuple(batches),
        fed=tuple(with_images(model, batches) if images else batches),
        masks=tuple(padding_mask(batch) for batch in batches),
        outputs=tuple(part.outputs.values()) if part else output_names(graph),
        part=part,
    )


def _swaps(graph: ir.Model) -> bool:
    """Whether the graph takes run-time weights: inputs that have a default, or are called as those of layers are."""
    inputs, defaults = graph.graph.inputs, graph.graph.initializers
    return any(value.name in defaults or (value.name or "").endswith(_LAYER_WEIGHTS) for value in inputs)


def _as_taken(adapter: Adapter, swappable: Swappable) -> Adapter:
    """`adapter` without copies of the base's weights that the model doesn't take: where they differ, outputs do."""
    taken = {weight.module for weight in swappable.weights if not weight.in_layer}
    untaken = set(adapter.copies) - taken
    saved = {path: tensors for path, tensors in adapter.modules_to_save.items() if path not in untaken}
    return replace(adapter, modules_to_save=saved)


def tolerance_of(dtype: DType, *, generates: bool) -> float:
    """The tolerance of a model of `dtype`, which may be one that `generates`."""
    return GENERATION_TOLERANCE if generates and dtype == "float32" else TOLERANCES[dtype]


def output_names(graph: ir.Model) -> tuple[str, ...]:
    """The outputs that are compared: all but key/value caches."""
    return tuple(name for value in graph.graph.outputs if not is_cache(name := value.name or ""))


def adapter_of(adapter: Adapter | str | Path) -> Adapter:
    """An adapter that was read already, or the one in a folder."""
    return adapter if isinstance(adapter, Adapter) else read_adapter(adapter)


def embedding_of(model: Path, graph: ir.Model) -> Embedding | None:
    """How the loratrf.json beside `model` says that its sentence_embedding is made; None where `graph` gives none.

    Raises UserError where it doesn't say.
    """
    if SENTENCE_EMBEDDING not in output_names(graph):
        return None
    path = model.with_name(MANIFEST)
    embedding = read_manifest(path).embedding if path.is_file() else None
    if embedding is None:
        raise UserError(
            f"{model} gives {SENTENCE_EMBEDDING}, and no {MANIFEST} beside it says how that is pooled. Keep an "
            "export's files together."
        )
    return embedding


def load_graph(model: Path) -> ir.Model:
    """The ONNX model in the file `model`. Raises UserError."""
    import onnx_ir as ir

    if not os.path.isfile(model):
        raise UserError(f"No model at {model}: expected an ONNX file, such as the --out of loratrf-export.")
    check_external_data(model)
    try:
        return ir.load(model)
    except Exception as error:  # protobuf and onnx_ir raise many classes
        raise UserError(
            f"{model} is not a readable ONNX model ({error}). Export it again with loratrf-export."
        ) from error


def model_dtype(model: ir.Model) -> DType:
    """The float type that most of the model's weights have, by number of values."""
    sizes: dict[DType, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point():
            own = tensor.dtype.numpy().name
            name = own if own in DTYPES else "float32"
            sizes[name] = sizes.get(name, 0) + tensor.size
    return max(sizes, key=lambda name: sizes[name], default="float32")


def _folded(adapter: Adapter, graphs: Sequence[ir.Model]) -> set[str]:
    """Layers whose low-rank half lies in the weights of the graphs, not in an operator."""
    ops: dict[str | None, str] = {}
    for node in [node for graph in graphs for node in graph.graph]:
        if op := node.op_type if node.domain == DOMAIN else node.metadata_props.get(OPERATOR):
            ops[node.metadata_props.get("module")] = op
    return {
        name
        for name, layer in adapter.layers.items()
        if layer.A is not None and "A" not in (FUNCTIONS[ops[name]].inputs if ops.get(name) in FUNCTIONS else ())
    }


def _batches(
    inputs: Sequence[Mapping[str, NDArray[Any]]] | Path | None, base: BaseModel, model: Path, *, images: bool
) -> list[Inputs]:
    if inputs is None:
        return default_inputs(base) + (image_batches(base.model.config) if images else [])
    if isinstance(inputs, Path):
        return read_inputs(inputs, base, model.parent)
    return [complete(dict(batch), base) for batch in inputs]


def _check_names(
    model: Path, graph: ir.Model, base: BaseModel, batches: Sequence[Inputs], weights: Collection[str]
) -> None:
    """UserError where the graph takes what the base doesn't, and is no run-time weight: it is another model's."""
    names = [value.name or "" for value in graph.graph.inputs if value.name not in graph.graph.initializers]
    own = {name for name in names if not is_cache(name) and not name.startswith(CROSS)}
    if foreign := sorted(own - {*batches[0], ADAPTER_IDS, POSITION_IDS, EMBEDS, *weights}):
        raise UserError(
            f"{model} takes {', '.join(names)}, but the base model {base.path} has no {', '.join(foreign)}. Expected a "
            "model that loratrf-export made from this adapter and base."
        )
