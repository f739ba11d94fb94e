"""One model for many adapters: every batch row names its own, in the graph input adapter_ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..adapters.adapter import Adapter, LayerAdapter, read_adapter
from ..adapters.fits import check_fits
from ..errors import UserError, some
from ..formats.adapter_file import SUFFIX, Origin, write_adapter_file
from ..formats.fit import check_always_active, check_swappable, fit
from ..formats.manifest import AdapterId, LayerRow, Manifest, Swappable
from ..formats.swappable import OPERATOR_PARTS, TABLE_PARTS, RuntimeWeight, layer_weights
from ..formats.tasks import TaskPart, in_graph, label_count, label_layer, label_names
from ..ops.dtypes import DType
from ..ops.schemas import ADAPTER_IDS, DOMAIN, FUNCTIONS, FilterInput
from ..parity.grouped import check_grouped_parity
from ..pytorch.base import GENERATION, TOWERS, BaseModel, load_base, tables_of
from ..pytorch.embedding import as_embedder
from ..pytorch.language import language_part, left_out
from ..pytorch.shared import share_trunk
from ..pytorch.vocabulary import without_copies
from ..runtime.slots import Slots
from .files import check_writable
from .onto import check_names
from .options import DEFAULT_OPSET, ExportOptions, check_encodes, check_layout, check_ranks
from .proven import (
    Clock,
    ExportResult,
    check_tokens,
    collector_off,
    common_facts,
    filter_input_of,
    traced_inputs,
    write_companions,
    write_proven,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..parity.result import ParityReport

__all__ = ["export_grouped"]

_OF_ONE = ("mode", "swappable", "device", "evaluate", "max_loss")
_NO_ROWS = {
    TOWERS: "texts and images are counted apart, and every text meets every image",
    "multiple-choice": "its layers see each choice as a row",
}


def export_grouped(
    adapters: Mapping[str, str | Path],
    out: str | Path,
    options: ExportOptions = ExportOptions(),
    *,
    step: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Writes one model that holds all `adapters` (name -> folder), in slots in their order; rows choose by adapter_ids.

    adapter_ids (batch) int64 is an input of the graph: a row's slot, or -1 for the base model alone. Layers are the
    union of the adapters', ranks the highest; classification heads are kept per adapter, with room for the most labels.
    Adapters of several tasks share the trunk, and each task has outputs of its own (`share_trunk`). Every weight is a
    graph input whose default is the adapters' own, (S, ...) with symbolic S and ranks, so that slots can be refilled
    without a new session. Files, options and exceptions are those of `export_adapter`; UserError too where the adapters
    don't share base or filter_input, or hold what can't differ per row.
    """
    out = Path(out)
    if flag := options.given(_OF_ONE):
        raise UserError(
            f"{flag} is for one adapter (--adapter PATH). A model of several always keeps them separate, in slots that "
            f"can be refilled at run time: drop {flag}."
        )
    check_writable(out)
    check_layout(out, options)
    check_names(adapters)
    loaded = {name: read_adapter(path) for name, path in adapters.items()}
    if options.pooling is not None:
        loaded = {name: as_embedder(adapter) for name, adapter in loaded.items()}
    _check_together(loaded, options.base_model)

    warnings = [f"{name}: {adapter.warning}" for name, adapter in loaded.items() if adapter.warning]

    def write(model: Path, clock: Clock) -> Manifest:
        return _write_model(loaded, model, clock, options, warnings)

    def prove(model: Path, _: Manifest, step: Callable[[str], None]) -> ParityReport:
        return check_grouped_parity(
            model, loaded, options.base_model, trust_remote_code=options.trust_remote_code, step=step
        )

    return write_proven(out, write, prove if options.check else None, step, warnings, options.root(out))


def _check_together(adapters: Mapping[str, Adapter], base_model: str | Path | None) -> None:
    """UserError naming the adapters that can't be in one model, as far as their files alone tell."""
    if not adapters:
        raise UserError("--adapters names no adapter, expected at least one: --adapters NAME=PATH ...")
    first_name, first = next(iter(adapters.items()))
    for name, adapter in adapters.items():
        check_swappable(adapter)
        check_always_active(adapter)
        remedy = "Leave it out and export it merged: --adapter PATH --mode merged."
        check_ranks(adapter, merges=False, device="cpu", remedy=remedy)
        if dora := [layer.name for layer in adapter.layers.values() if layer.magnitude is not None]:
            raise UserError(
                f"The adapter {name} is a DoRA, which rescales the outputs of the base's layers ({some(dora)}), and "
                "rows of a batch share these. Export it by itself: --adapter PATH."
            )
        if base_model is None and adapter.base_model != first.base_model:
            raise UserError(
                f"The adapters {first_name} and {name} name different base models ({first.base_model} and "
                f"{adapter.base_model}). If these are the same model, pass it: --base-model PATH. Otherwise export "
                "them apart."
            )


@dataclass(frozen=True)
class _Base:
    """What the `adapters` share: the `base`, each one's task and labels, and each task's part of a model of several.

    The base has room for the most labels of any adapter.
    """

    base: BaseModel
    adapters: Mapping[str, Adapter]
    task_of: Mapping[str, str]
    labels: Mapping[str, tuple[str, ...] | None]
    parts: Mapping[str, TaskPart]
    trunk: str

    def in_graph(self, name: str, adapter: Adapter) -> Adapter:
        """The adapter `name` with its modules as the graph calls them."""
        return in_graph(adapter, self.parts.get(self.task_of[name]), self.trunk)


@dataclass(frozen=True)
class _Contents:
    """What one model is to hold: the union of the adapters' `layers`, its run-time `weights`, their values in `slots`.

    `values` are each adapter's own, by its name. Slots are in the order of `adapters`.
    """

    adapters: Mapping[str, Adapter]
    layers: Mapping[str, LayerAdapter]
    weights: Sequence[RuntimeWeight]
    slots: Slots
    values: Mapping[str, Mapping[str, NDArray[Any]]]
    filter_input: FilterInput

    @property
    def first(self) -> Adapter:
        return next(iter(self.adapters.values()))


def _write_model(
    adapters: Mapping[str, Adapter], out: Path, clock: Clock, options: ExportOptions, warnings: list[str]
) -> Manifest:
    clock("loading the base model")
    shared = _load_shared(adapters, out, options)
    base, adapters = shared.base, shared.adapters
    parts = {name: language_part(adapter, base.model) for name, adapter in adapters.items()}
    adapters = {name: adapter for name, (adapter, _) in parts.items()}
    warnings += [f"{name}: {text}" for name, (_, left) in parts.items() for text in left_out(left)]
    clock("adapting")
    contents = _contents(adapters, shared, options.dtype)
    write = _write_generating if base.task == GENERATION else _write_encoder
    opset, versions, kept = write(contents, base, out, clock, options)
    ids = {name: AdapterId.of(adapter, shared.task_of[name], shared.labels[name]) for name, adapter in adapters.items()}
    swappable = Swappable(
        "adapter",
        tuple(contents.weights),
        slots={name: slot for slot, name in enumerate(adapters)},
        adapters=ids,
        base_parameters=base.parameters,
        tasks=dict(shared.parts),
        trunk=shared.trunk,
    )
    rows = [_row(layer, contents.slots) for layer in contents.layers.values()]
    manifest = common_facts(
        base, list(adapters.values()), out, options, opset, rows, swappable=swappable, versions=versions, kept=kept
    )
    for name, own in contents.values.items():
        write_adapter_file(out.with_name(f"{name}{SUFFIX}"), own, Origin.of(adapters[name], manifest, ids[name]))
    return manifest


def _load_shared(adapters: Mapping[str, Adapter], out: Path, options: ExportOptions) -> _Base:
    """The adapters' base, with a head for each of their tasks. UserError where one doesn't fit it."""
    from .pool import with_embedding

    by_type: dict[str | None, dict[str, Adapter]] = {}
    for name, adapter in adapters.items():
        by_type.setdefault(adapter.task_type, {})[name] = adapter
    bases, task_of = dict[str, BaseModel](), dict[str, str]()
    for members in by_type.values():
        # The first of those with the most labels: what others lack is padded.
        most = max(members.values(), key=lambda adapter: label_count(adapter) or 0)
        base = load_base(most, options.base_model, trust_remote_code=options.trust_remote_code)
        _check_generates(most, base, out)
        if base.task not in bases or bases[base.task].model.config.num_labels < base.model.config.num_labels:
            bases[base.task] = base
        task_of |= dict.fromkeys(members, base.task)
    for name, adapter in adapters.items():
        _check_fits(adapter, bases[task_of[name]])
    adapters = {name: without_copies(adapter, bases[task_of[name]].model) for name, adapter in adapters.items()}
    pools = "feature-extraction" if "feature-extraction" in bases else next(iter(bases))
    pooled = [adapter for name, adapter in adapters.items() if task_of[name] == pools]
    bases[pools] = with_embedding(bases[pools], pooled, options)
    known = {task: base.model.config.id2label for task, base in bases.items()}
    labels = {name: label_names(adapter, task_of[name], known[task_of[name]]) for name, adapter in adapters.items()}
    base, parts, trunk = share_trunk(bases) if len(bases) > 1 else (bases[pools], {}, "")
    return _Base(base, adapters, task_of, labels, parts, trunk)


def _check_generates(adapter: Adapter, base: BaseModel, out: Path) -> None:
    """UserError for a model that generates, and not through onnxruntime-genai."""
    from .genai import knows

    if base.answers or (base.task == GENERATION and not knows(adapter, base, out)):
        raise UserError(
            f"--adapters is not for a {type(base.model).__name__}: it isn't made by onnxruntime-genai's builder, and "
            "several adapters go into one model that generates through that alone. It makes LLaMA, Mistral, Qwen, "
            "Gemma, Phi and others. Export each adapter by itself: --adapter PATH."
        )


def _check_fits(adapter: Adapter, base: BaseModel) -> None:
    """`check_fits`, where the adapter may have fewer labels than `base` has room for."""
    layer, count = label_layer(adapter), label_count(adapter)
    parameters = dict(base.parameters)
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if (shape := parameters.get(name)) and count is not None and count <= shape[0]:
            parameters[name] = (count, *shape[1:])
    check_fits(adapter, parameters, tables=tables_of(base.model))


def _contents(adapters: Mapping[str, Adapter], shared: _Base, dtype: DType) -> _Contents:
    """Raises UserError where an adapter doesn't go with the others."""
    base = shared.base
    if base.task == GENERATION:
        _check_no_saved_modules(adapters)
    filter_input = filter_input_of(list(adapters.values()))
    named = {name: shared.in_graph(name, adapter) for name, adapter in adapters.items()}
    layers = _union(named.values(), base.parameters)
    weights = [weight for layer in layers.values() for weight in layer_weights(layer, _parts(layer), dtype, "adapter")]
    weights += _head_weights(named, shared, dtype)
    slots = Slots(weights, len(adapters))
    values = {name: fit(adapter, weights, filter_input, shared.task_of[name]) for name, adapter in named.items()}
    for slot, own in enumerate(values.values()):
        slots.put(slot, own)
    return _Contents(adapters, layers, weights, slots, values, filter_input)


def _check_no_saved_modules(adapters: Mapping[str, Adapter]) -> None:
    for name, adapter in adapters.items():
        if adapter.modules_to_save:
            raise UserError(
                f"The adapter {name} saves {some(adapter.modules_to_save)} whole, and rows of a language model share "
                f"its own weights. Export it by itself (--adapter {adapter.path}), or train it without modules_to_save."
            )


def _write_encoder(
    contents: _Contents, base: BaseModel, out: Path, clock: Clock, options: ExportOptions
) -> tuple[int, dict[str, str], list[str]]:
    """Traces any model but a causal language model; returns the opset, versions of further packages (none), and the
    layers that stayed in float32 beside quantised ones."""
    import onnx_ir as ir
    import torch

    from .graph import finish, inline, trace
    from .pool import pool
    from .positions import positions_by_row
    from .quantise import quantise

    check_encodes(options, base.task)
    check_tokens(contents.first, base)
    if rows := _NO_ROWS.get(base.task):
        raise UserError(
            f"--adapters gives each row of a batch its own adapter, and a model of {base.task} has no such rows: "
            f"{rows}. Export the adapters apart, or one of them with --swappable base and the others with --onto."
        )
    opset, dtype = options.opset or DEFAULT_OPSET, options.dtype
    _attach(base, contents.layers, contents.weights, contents.filter_input)
    base.model.to(getattr(torch, dtype))
    inputs = traced_inputs(base, dtype)
    clock("tracing")
    with collector_off(), positions_by_row(base.model):
        fusions = None if options.portable else options.device
        program = trace(base.model, inputs, opset, fusions, base.outputs, any_size=base.any_size)
        _add_adapter_ids(program.graph)
        finish(program, opset)
    if base.embedding is not None:
        pool(program, base.embedding)
    _slots_to_inputs(program.graph, contents)
    kept: list[str] = []
    if options.quantize != "none":
        kept = quantise(program, patterns=options.keep_float, traced=base.model)
    if options.portable:
        inline(program)
    clock("writing")
    ir.save(program, out, external_data=options.weights_of(out))
    write_companions(base, contents.first, out, options, alone=False)
    return opset, {}, kept


def _write_generating(
    contents: _Contents, base: BaseModel, out: Path, clock: Clock, options: ExportOptions
) -> tuple[int, dict[str, str], list[str]]:
    """Builds a causal language model; returns the opset, the version of what built it, and no layers."""
    from .behind import insert
    from .genai import build_graph, save

    model = build_graph(contents.first, base, out, options, contents.layers, changed=False, step=clock)
    parts = {
        path: {part: contents.slots.values[f"{path}.{name}"] for part, name in _parts(layer).items()}
        for path, layer in contents.layers.items()
    }
    insert(model, parts, contents.filter_input, options.dtype, tables=_tables(contents.layers))
    _add_adapter_ids(model.graph)
    _slots_to_inputs(model.graph, contents)
    save(model, out, options)
    return model.opset_imports[""], {"onnxruntime-genai": metadata.version("onnxruntime-genai")}, []


def _union(adapters: Iterable[Adapter], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LayerAdapter]:
    """Every layer that an adapter has, with both halves at rank 1; the weights proper come after the trace.

    An embedding table has no filter.
    """
    from .swappable import Noise

    noise, layers = Noise(), {}
    tables = {path: layer.embedding for adapter in adapters for path, layer in adapter.layers.items()}
    for path, embedding in sorted(tables.items()):
        outs, ins = shapes[f"{path}.weight"][:: -1 if embedding else 1]
        parts: dict[str, Any] = {"A": noise.of(1, ins), "B": noise.of(outs, 1)}
        filters = {"tau": (outs,), "C": (1, outs), "D": (outs, 1)}
        parts |= {part: None if embedding else noise.of(*size) for part, size in filters.items()}
        layers[path] = LayerAdapter(path, **parts, lora_bias=None, scale=1.0, gamma=1.0, embedding=embedding)
    return layers


def _parts(layer: LayerAdapter) -> Mapping[str, str]:
    return TABLE_PARTS if layer.embedding else OPERATOR_PARTS


def _tables(layers: Mapping[str, LayerAdapter]) -> set[str]:
    return {path for path, layer in layers.items() if layer.embedding}


def _head_weights(adapters: Mapping[str, Adapter], shared: _Base, dtype: DType) -> list[RuntimeWeight]:
    """One weight per parameter of the modules that adapters save whole: linear layers with a bias, and nothing else."""
    from torch import nn

    weights: dict[str, RuntimeWeight] = {}
    for name, adapter in adapters.items():
        for path, tensors in adapter.modules_to_save.items():
            for parameter in tensors:
                linear, _, kind = f"{path}.{parameter}".rpartition(".")
                module = shared.base.model.get_submodule(linear)
                if not isinstance(module, nn.Linear) or module.bias is None:
                    raise UserError(
                        f"The adapter {name} saves {linear}, a {type(module).__name__}: in one model for many adapters "
                        "only linear layers with a bias can be saved per adapter. Export it on its own."
                    )
                shape = tuple(module.get_parameter(kind).shape)
                weights[f"{linear}.{kind}"] = RuntimeWeight(
                    f"{linear}.slots.{kind}",
                    path,
                    parameter,
                    shape,
                    dtype,
                    default="adapter",
                    task=_task_alone(path, shared),
                    labels=linear == label_layer(adapter),
                )
    return list(weights.values())


def _task_alone(path: str, shared: _Base) -> str | None:
    """Which task alone the saved module `path` of the graph works for, None where others read what it gives."""
    for task, part in shared.parts.items():
        if part.head and path.startswith(part.head):
            return task
    # What the pooler gives is read by one head at most, and is no output of a model of several tasks.
    if shared.parts and path.removeprefix(shared.trunk).partition(".")[0] == "pooler":
        return "text-classification"
    return None


def _attach(
    base: BaseModel, layers: Mapping[str, LayerAdapter], weights: Iterable[RuntimeWeight], filter_input: str
) -> None:
    """Puts one slot of placeholders into the base model: GroupedLoraTrf on `layers`, GroupedLinear on saved heads."""
    import torch

    from .adapted import op_of, wrap
    from .swappable import Noise

    for path, layer in layers.items():
        values = {part: torch.from_numpy(getattr(layer, part))[None] for part in _parts(layer)}
        op = op_of(values, embedding=layer.embedding)
        wrap(base.model, path, op, values, {"filter_input": filter_input} if FUNCTIONS[op].attributes else {})
    noise = Noise()
    heads = {weight.name.rpartition(".slots.")[0]: None for weight in weights if not weight.in_layer}
    for path in heads:
        linear = base.model.get_submodule(path)
        for kind, parameter in linear.named_parameters():
            if f"{path}.{kind}" in base.untrained:  # what row -1 gives must not be by chance
                parameter.data.zero_()
        values = {
            "W": torch.from_numpy(noise.of(1, *linear.weight.shape)),
            "b": torch.from_numpy(noise.of(1, *linear.bias.shape)),
        }
        wrap(base.model, path, "GroupedLinear", values)


def _add_adapter_ids(graph: ir.Graph) -> None:
    """The graph input adapter_ids int64, one id for each row of the first input, the last input of every grouped node.

    It has no default: a caller who forgets it gets an error, not the base's answer.
    """
    import onnx_ir as ir

    shape = ir.Shape([_batch_axis(graph)])
    ids = ir.Value(name=ADAPTER_IDS, type=ir.TensorType(ir.DataType.INT64), shape=shape)
    graph.inputs.append(ids)
    for node in _grouped_nodes(graph):
        node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(len(node.inputs) - 1, ids)


def _slots_to_inputs(graph: ir.Graph, contents: _Contents) -> None:
    """Makes the weights of all slots inputs of the finished `graph`. UserError where a layer sees no rows of the batch.

    There, such as at relative positions that all rows share, rows have no adapter of their own.
    """
    from .swappable import weights_to_inputs

    batch = _batch_axis(graph)
    wrong = [
        node.metadata_props.get("module", "")
        for node in _grouped_nodes(graph)
        if (shape := node.outputs[0].shape) is None or str(shape[0]) != batch
    ]
    if wrong:
        raise UserError(
            f"{some(dict.fromkeys(wrong))} also runs on what is no row of the batch, such as relative positions that "
            "all rows share. There, rows can't have adapters of their own: export the adapters apart, or train them on "
            "other layers."
        )
    shapes = {weight.name: ("slots", *weight.shape) for weight in contents.weights}
    weights_to_inputs(graph, shapes, contents.slots.values)


def _batch_axis(graph: ir.Graph) -> str:
    """What the first axis of the graph's first input is called: "batch" after a trace, "batch_size" by the builder."""
    shape = graph.inputs[0].shape
    return str(shape[0]) if shape is not None else ""


def _grouped_nodes(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph.all_nodes() if node.domain == DOMAIN]


def _row(layer: LayerAdapter, slots: Slots) -> LayerRow:
    names = _parts(layer)
    rank, filter_rank = (slots.values[f"{layer.name}.{names[part]}"].shape[1] if part in names else 0 for part in "AC")
    op = "GroupedLowRankEmbedding" if layer.embedding else "GroupedLoraTrf"
    return LayerRow(layer.name, op, rank, filter_rank, layer.in_features, layer.out_features)
