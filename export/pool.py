"""A sentence's embedding as the first output of a finished graph, in standard ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.tape import Tape

from ..adapters.adapter import Adapter
from ..errors import UserError, some
from ..formats.embedding import MODULES_FILE, SENTENCE_EMBEDDING, Embedding
from ..pytorch.base import TOWERS, BaseModel
from ..pytorch.embedding import declared
from .options import ExportOptions

__all__ = ["pool", "with_embedding"]

HIDDEN, MASK = "last_hidden_state", "attention_mask"


def with_embedding(base: BaseModel, adapters: Sequence[Adapter], options: ExportOptions) -> BaseModel:
    """`base` with the embedding that `options` ask for; as it is where they ask for none.

    Raises UserError where its models have none, or none of this size, and where "auto" finds nothing to follow.
    """
    if options.pooling is None:
        return base
    if base.task == TOWERS:
        raise UserError(
            f"--pooling is {options.pooling}, and this model's towers pool by themselves: text_embeds and image_embeds "
            "are its embeddings. Leave --pooling out."
        )
    if base.task != "feature-extraction":
        raise UserError(
            f"--pooling is {options.pooling}, and this adapter's task is {base.task}: sentence embeddings are made by "
            "adapters of task_type FEATURE_EXTRACTION, trained on the model without a head. Leave --pooling out."
        )
    if MASK not in base.input_names:
        raise UserError(
            f"--pooling tells tokens from padding by {MASK}, and this model takes {', '.join(base.input_names)} alone. "
            f"Leave --pooling out: the tokens are the output {HIDDEN}."
        )
    embedding = _declared(adapters, base) if options.pooling == "auto" else Embedding(options.pooling)
    width = getattr(base.model.config, "hidden_size", None)
    if options.dimensions is not None and isinstance(width, int) and options.dimensions > width:
        raise UserError(
            f"--dimensions is {options.dimensions}, and the base's embeddings have {width}: expected 1 to {width}. "
            "Leave it out to keep all."
        )
    normalize = options.normalize or embedding.normalize
    return replace(base, embedding=replace(embedding, normalize=normalize, dimensions=options.dimensions))


def _declared(adapters: Sequence[Adapter], base: BaseModel) -> Embedding:
    """What modules.json says, of all `adapters` the same."""
    found = {str(adapter.path): declared(adapter, base) for adapter in adapters}
    first, *others = dict.fromkeys(found.values())
    if others:
        said = [f"{path}: {embedding.summary if embedding else 'nothing'}" for path, embedding in found.items()]
        raise UserError(
            f"--pooling auto finds that the adapters' embeddings differ ({some(said, '; ')}), and one model has one "
            "kind. Export them apart, or say which: --pooling mean, cls or last."
        )
    if first is None:
        raise UserError(
            f"--pooling auto follows sentence-transformers' {MODULES_FILE}, and neither {some(found)} nor the base "
            f"{base.path} has one. Say how the model was trained to pool: --pooling mean, cls or last, and --normalize "
            "where its embeddings have unit length. Its model card tells."
        )
    return first


def pool(model: ir.Model, embedding: Embedding) -> None:
    """Adds the graph output sentence_embedding (batch, W) float32, in place. Requires a graph from `finish`. The rules:

    1. It stands before the tokens, last_hidden_state, which stay: parity holds both, and late interaction reads them.
    2. All of it is computed in float32, whatever the model's type: in float16, a mean would round once more.
    3. What padded tokens hold, be it NaN, never enters: it is chosen away, not multiplied by 0.
    """
    graph = model.graph
    hidden = next(value for value in graph.outputs if value.name == HIDDEN)
    mask = next(value for value in graph.inputs if value.name == MASK)
    assert hidden.shape is not None
    tape = Tape()
    row = _mean(tape, hidden, mask) if embedding.pooling == "mean" else _one(tape, hidden, mask, embedding.pooling)
    if embedding.dimensions is not None:
        row = tape.op("Slice", [row, _ints(tape, 0), _ints(tape, embedding.dimensions), _ints(tape, 1)])
    if embedding.normalize:
        length = tape.op("Clip", [tape.op("ReduceL2", [row, _ints(tape, 1)]), _float(tape, 1e-12)])
        row = tape.op("Div", [row, length])
    for number, node in enumerate(tape.nodes):
        node.name = f"{SENTENCE_EMBEDDING}/{node.op_type}_{number}"
    row.name, row.type = SENTENCE_EMBEDDING, ir.TensorType(ir.DataType.FLOAT)
    row.shape = ir.Shape([hidden.shape[0], embedding.dimensions or hidden.shape[2]])
    graph.extend(tape.nodes)
    graph.outputs.insert(0, row)


def _mean(tape: Tape, hidden: ir.Value, mask: ir.Value) -> ir.Value:
    """Σ mask·h / max(Σ mask, 1), (B,H)."""
    tokens = tape.op("Cast", [hidden], {"to": ir.DataType.FLOAT})
    counted = tape.op("Unsqueeze", [tape.op("Cast", [mask], {"to": ir.DataType.BOOL}), _ints(tape, 2)])
    kept = tape.op("Where", [counted, tokens, _float(tape, 0.0)])
    total = tape.op("ReduceSum", [kept, _ints(tape, 1)], {"keepdims": 0})
    weights = tape.op("Cast", [mask], {"to": ir.DataType.FLOAT})
    count = tape.op("Clip", [tape.op("ReduceSum", [weights, _ints(tape, 1)]), _float(tape, 1.0)])
    return tape.op("Div", [total, count])


def _one(tape: Tape, hidden: ir.Value, mask: ir.Value, which: str) -> ir.Value:
    """h of the first or the last token that isn't padding, (B,H); zeros where all of a row is."""
    weights = tape.op("Cast", [mask], {"to": ir.DataType.FLOAT})  # ONNX Runtime's ArgMax takes few types on CUDA
    index = tape.op("ArgMax", [weights], {"axis": 1, "select_last_index": int(which == "last")})
    row = tape.op("Cast", [tape.op("GatherND", [hidden, index], {"batch_dims": 1})], {"to": ir.DataType.FLOAT})
    some = tape.op("Cast", [tape.op("ReduceMax", [weights, _ints(tape, 1)])], {"to": ir.DataType.BOOL})
    return tape.op("Where", [some, row, _float(tape, 0.0)])


def _ints(tape: Tape, value: int) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": [value]})


def _float(tape: Tape, value: float) -> ir.Value:
    return tape.op("Constant", [], {"value_float": value})
