"""torch model -> ONNX graph: tracing through transformers' exporter, then `PASSES` over the IR, in their order."""

from __future__ import annotations

import ast
import contextlib
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..errors import UserError, some
from ..formats.stages import CROSS
from ..genai.names import is_cache
from ..ops.schemas import DOMAIN, FUNCTIONS, OPERATOR, VERSION, function_body
from ..pytorch.base import DECODER_INPUT, max_sequence
from ..pytorch.shapes import SMALLEST_IMAGE, axes_of, text_config, wave_length
from .options import DEFAULT_OPSET

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["PASSES", "finish", "inline", "modules_of", "trace"]

IR_VERSION = 10
"""Read by ONNX Runtime 1.19 and later; the oldest runtime we support is 1.21."""

_FEWER = {"samples": "frames", "height": "map_height", "width": "map_width"}
"""What an output has of them, where it has one for several."""


def trace(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    opset: int = DEFAULT_OPSET,
    device: str | None = "cpu",
    outputs: Collection[str] = (),
    *,
    any_size: bool = False,
) -> ir.Model:
    """The ONNX IR of `model` on `inputs` (name -> tensor), with the fusions of ONNX Runtime for `device`, None without.

    Batch and sequence are dynamic. Of images height and width are too, with `any_size`. Of what `model` gives only
    `outputs` stay, where it gives one of them. Raises UserError where torch can't trace or ONNX can't express the
    model.
    """
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    counts = ("batch", "text_batch", "image_batch", "choices")
    free: dict[str, tuple[int, int | None]] = dict.fromkeys(counts, (1, None))
    if "input_ids" in inputs:
        free["sequence"] = (1, max_sequence(text_config(model.config)))
    if "input_values" in inputs and inputs["input_values"].ndim == 2:
        free["samples"] = (wave_length(model.config, 1), None)
    if any_size:
        free |= dict.fromkeys(("height", "width"), (SMALLEST_IMAGE, None))
    dims = {axis: torch.export.Dim(axis, min=least, max=most) for axis, (least, most) in free.items()}
    shared = {
        name: {number: dims[axis] for number, axis in enumerate(axes_of(name, value.ndim, inputs)) if axis in dims}
        for name, value in inputs.items()
    }
    attempts: list[dict[str, Any]] = [
        {"dynamic_shapes": shared, "prefer_deferred_runtime_asserts_over_guards": True},
        # Models with control flow on shapes (DeBERTa-v2) don't prove shared, bounded symbols; free ones they trace.
        {"dynamic": True},
    ]
    failure: Exception | None = None
    for options in attempts:
        config = OnnxConfig(ort_fusions=device, opset_version=opset, **options)  # type: ignore[arg-type]
        try:
            with _giving(model, outputs):
                return OnnxExporter().export(model, dict(inputs), config=config).program
        except Exception as error:  # torch.export raises many classes
            failure = failure or error
    said = (str(failure).strip().splitlines() or [type(failure).__name__])[0].rstrip(".")
    raise UserError(
        f"{type(model).__name__} can't be traced to ONNX: {said}. It may need a newer transformers or torch; families "
        "proven with this version are in the README."
    ) from failure


@contextlib.contextmanager
def _giving(model: PreTrainedModel, outputs: Collection[str]) -> Iterator[None]:
    """Inside, `model` gives nothing but `outputs`: what else it gives is no part of what is traced then."""
    whole = model.forward

    @functools.wraps(whole)
    def forward(*args: Any, **options: Any) -> Any:
        given = whole(*args, **options)
        return {name: given[name] for name in outputs if name in given} or given

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def finish(model: ir.Model, opset: int = DEFAULT_OPSET) -> None:
    """Makes a traced graph one to ship, in place: `PASSES`, one after the other. Requires a graph from `trace`."""
    for run in PASSES:
        run(model, opset)


def inline(model: ir.Model) -> None:
    """What the loratrf operators are defined as stands in their place, so that ONNX's own operators are all there is.

    In place; the node that gives an operator's output says in "operator" which it was. Requires a graph from `finish`,
    traced without fusions. Raises UserError where others are left.
    """
    from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

    given = {
        node.outputs[0].name: node.metadata_props | {OPERATOR: node.op_type}
        for node in model.graph
        if node.domain == DOMAIN
    }
    InlinePass()(model)
    RemoveUnusedNodesPass()(model)  # a definition may take what its operator isn't asked for
    for node in model.graph:
        node.metadata_props.update(given.get(node.outputs[0].name, {}))
    model.graph.opset_imports.pop(DOMAIN, None)
    if foreign := sorted({f"{node.domain}.{node.op_type}" for node in model.graph.all_nodes() if node.domain}):
        raise UserError(
            f"--portable is for ONNX's own operators alone, and this model has {some(foreign)}. Export it without."
        )


def _add_functions(model: ir.Model, opset: int) -> None:
    """Every loratrf operator that occurs has its definition in standard ops as a model-local function."""
    for node in [node for node in model.graph.all_nodes() if node.domain == DOMAIN]:
        attribute = node.attributes.get("filter_input")
        filter_input = attribute.as_string() if attribute is not None else "adapted"
        body = function_body(node.op_type, opset, filter_input)
        known = model.functions.setdefault(body.identifier(), body)
        known.metadata_props.setdefault("filter_input", filter_input)
        if known.metadata_props["filter_input"] != filter_input:
            raise UserError(
                f"Layers of one model can't differ in filter_input, got {known.metadata_props['filter_input']!r} and "
                f"{filter_input!r} (at {node.name})."
            )
        # A node of the custom op must call the function: same domain, name and (empty) overload.
        node.version = None
    for function in model.functions.values():
        function.metadata_props.clear()
        model.graph.opset_imports[DOMAIN] = VERSION


def _name_axes(model: ir.Model, opset: int) -> None:
    """Dynamic axes are named as `axes_of` says, batch and sequence for one, a cache's past_sequence; torch calls them
    s18, s41.

    Where convolutions make fewer of them, an output has frames of sound, and the height and width of its own map.
    """
    graph, names = model.graph, dict[str, str]()
    inputs = [value.name or "" for value in graph.inputs]
    for value in graph.inputs:
        shape = value.shape or ()
        for axis, dim in zip(_axes(value.name or "", len(shape), inputs), shape, strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value:
                names.setdefault(dim.value, axis)

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        text = re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match.group(), match.group()), dim.value)
        return int(text) if text.isdecimal() else fewer.get(text, text)

    fewer: dict[str, str] = {}
    for dim in [dim for value in graph.outputs for dim in value.shape or ()]:
        text = str(renamed(dim))
        if found := [name for axis, name in _FEWER.items() if axis in text and axis != text]:
            fewer[text] = found[0]
    values = [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _axes(name: str, rank: int, inputs: Collection[str]) -> tuple[str, ...]:
    """As `axes_of`; a decoder's caches, and its mask, which covers the tokens in the cache too."""
    if _is_past(name) or name.startswith(CROSS):
        return ("batch", "heads", "past_sequence" if _is_past(name) else "sequence", "width")
    if name == DECODER_INPUT:
        return ("batch", "decoder_sequence")
    if name == "attention_mask" and "input_ids" in inputs and any(map(_is_past, inputs)):
        return ("batch", "total_sequence")
    return axes_of(name, rank, inputs)


def _is_past(name: str) -> bool:
    return is_cache(name.removeprefix("input."))


def _drop_unread_outputs(model: ir.Model, opset: int) -> None:
    """No node gives what nobody reads at the end of its outputs.

    Fusions declare all four of SkipLayerNormalization, and OpenVINO's execution provider refuses those of training.
    """
    for node in model.graph.all_nodes():
        read = [number for number, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
        node.resize_outputs(max(read, default=0) + 1)


def _transpose_unlike_ranks(model: ir.Model, opset: int) -> None:
    """No FusedMatMul transposes a batch where its inputs differ in rank: torch's MultiheadAttention makes such.

    The exporter fuses them, and ONNX Runtime wants inputs of one rank then.
    """
    for node in [node for node in model.graph if node.op_type == "FusedMatMul"]:
        ranks = [len(value.shape) if value is not None and value.shape is not None else 0 for value in node.inputs]
        for index, name in enumerate(("transBatchA", "transBatchB")):
            value, rank = node.inputs[index], ranks[index]
            if len(set(ranks)) < 2 or value is None or not node.attributes.get_int(name, 0):
                continue
            order = [*range(1, rank - 1), 0, rank - 1]
            turned = ir.node("Transpose", [value], attributes={"perm": order})
            assert value.shape is not None
            turned.outputs[0].shape = ir.Shape([value.shape[axis] for axis in order])
            turned.outputs[0].type = value.type
            turned.metadata_props.update(node.metadata_props)
            model.graph.insert_before(node, turned)
            node.replace_input_with(index, turned.outputs[0])
            del node.attributes[name]


def _module(node: ir.Node) -> str:
    return node.metadata_props.get("module", "")


def _keep_modules_only(model: ir.Model, opset: int) -> None:
    """A node's metadata says in "module" which torch module's output it computes, and nothing else.

    torch's own has source lines and paths of the machine that exported.
    """
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        module = ast.literal_eval(scopes)[-2] if scopes and scopes.count(",") else ""
        node.metadata_props.clear()
        if module and not module.startswith("_"):
            node.metadata_props["module"] = module
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None


def _float32_at_the_ends(model: ir.Model, opset: int) -> None:
    """No input and output of the graph is bfloat16: numpy has none, so ONNX Runtime's Python takes and gives none."""
    graph = model.graph
    for value in graph.inputs:
        if value.dtype == ir.DataType.BFLOAT16:
            readers = tuple(value.uses())
            cast = _cast(value, ir.DataType.BFLOAT16)
            for reader, index in readers:
                reader.replace_input_with(index, cast.outputs[0])
            value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.insert_before(graph[0], cast)
    for index, value in enumerate(graph.outputs):
        if value.dtype == ir.DataType.BFLOAT16:
            cast = _cast(value, ir.DataType.FLOAT)
            value.name, cast.outputs[0].name = f"{value.name}.bfloat16", value.name
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype})
    node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(dtype)
    return node


def _state_shapes(model: ir.Model, opset: int) -> None:
    """Initializers have the shapes that are said: fusions call a scale (1) a scalar, where shape inference stops."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.shape = ir.Shape(value.const_value.shape.numpy())
            value.type = ir.TensorType(value.const_value.dtype)


def _name_initializers(model: ir.Model, opset: int) -> None:
    """Initializers are named after modules. Requires `_keep_modules_only`.

    torch's own names stay; a weight that was transposed for MatMul is "<module>.MatMul.weight", siblings that were
    packed into one are "<parent>.<a>_<b>_<c>.MatMul.weight".
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        if "." in (value.name or "") or value.shape is None or len(value.shape) < 2:
            continue  # named by torch already, or a constant of the graph's own arithmetic
        users = [node for node in value.consumers() if node.op_type in ("MatMul", "Gemm")]
        if not users:
            continue
        name = _module(users[0]) or _packed_module(users[0])
        if name:
            _rename_initializer(graph, value, f"{name}.{users[0].op_type}.weight")


def _packed_module(matmul: ir.Node) -> str:
    """ "a.b.query_key_value" for a MatMul that the exporter packed out of a.b.query, a.b.key and a.b.value."""
    paths = modules_of(matmul)
    if len({path.rpartition(".")[0] for path in paths}) != 1:
        return ""
    return f"{paths[0].rpartition('.')[0]}.{'_'.join(path.rpartition('.')[2] for path in paths)}"


def modules_of(product: ir.Node) -> list[str]:
    """The torch modules whose outputs `product` computes, side by side where the exporter packed several into one.

    Empty where the graph doesn't tell. Requires `_keep_modules_only`.
    """
    if name := _module(product):
        return [name.removesuffix(".base_layer")]
    splits = [node for node in product.outputs[0].consumers() if node.op_type == "Split"]
    users = [next(iter(output.consumers()), None) for split in splits for output in split.outputs]
    paths = [_module(user).removesuffix(".base_layer") for user in users if user is not None and _module(user)]
    return paths if len(paths) == len(users) else []


def _rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    unique, count = name, 1
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    del graph.initializers[value.name or ""]
    value.name = unique
    if value.const_value is not None:
        value.const_value.name = unique
    graph.initializers[unique] = value


def _name_nodes(model: ir.Model, opset: int) -> None:
    """Nodes are named "<module>/<op>", outputs of loratrf ops "<module>.output". Requires `_keep_modules_only`."""
    counts: dict[str, int] = {}
    for node in model.graph:
        stem = f"{_module(node)}/{node.op_type}"
        counts[stem] = counts.get(stem, 0) + 1
        node.name = stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"
        if node.domain == DOMAIN and node.op_type in FUNCTIONS and not node.outputs[0].is_graph_output():
            # A shared layer (DeBERTa's position projections) is called more than once.
            node.outputs[0].name = f"{_module(node)}.output" + ("" if counts[stem] == 1 else f"_{counts[stem]}")


def _sign(model: ir.Model, opset: int) -> None:
    """The file says who made it, in an IR version that every runtime we support reads."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "loratrf-deploy", None


PASSES: tuple[Callable[[ir.Model, int], None], ...] = (
    _add_functions,
    _drop_unread_outputs,
    _transpose_unlike_ranks,
    _name_axes,
    _keep_modules_only,
    _float32_at_the_ends,
    _state_shapes,
    _name_initializers,
    _name_nodes,
    _sign,
)
"""Each leaves in the model, in place, what its docstring says. They are given the opset, for functions."""
