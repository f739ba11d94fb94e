"""What onnxruntime-genai's builder misreads in a transformers model, put in its words or mended in its graph.

The builder looks for attributes of older transformers and takes silence for a default, so a model comes out wrong
without a word: Mistral's sliding window lies in one field, and the builder asks for a kind by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..genai.names import linear_nodes
from .behind import put_behind

if TYPE_CHECKING:
    import torch

__all__ = ["Rotation", "in_builders_words", "mend", "rotations", "write_rotations"]

_OLMO_EPSILON = 1e-5
"""In transformers' code, not in the configuration."""

Rotation = tuple[NDArray[np.float32], float]
"""Frequencies (half the rotated width), and the factor on cosine and sine."""

_CACHE_OF_LAYERS = {"full_attention": "_global", "sliding_attention": "_local"}
"""Of a model whose kinds of layers rotate differently: what the builder appends to the names of its tables."""


def in_builders_words(config: Any) -> None:
    """Changes `config`, which the builder alone reads, in place: same model, other words. The rules:

    1. A sliding window is one of layers: Mistral's and Phi-3's, which have no kinds of layers, is one of all.
    2. Positions are rotated as in the plainest model of the same theta, whose tables `write_rotations` replaces; but
       GPT-OSS's stay YaRN, which the builder insists on, and Phi-3's long and short tables come from its LongRoPE.
    3. Gemma 3's two kinds of layers each have their theta in a field of its own.
    4. Norms that are no RMS norms have an epsilon too, which the builder seeks under the name of theirs, else 1e-6.
    """
    if getattr(config, "sliding_window", None) is not None and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type.startswith("gemma3") and "full_attention" in rope:
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        config.rope_parameters = {"rope_type": "default", "rope_theta": rope["full_attention"]["rope_theta"]}
    elif rope.get("rope_type") == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")[1]
        config.rope_parameters = rope | {"type": "longrope", "short_mscale": factor, "long_mscale": factor}
    elif rope.get("rope_type", "default") != "default" and config.model_type != "gpt_oss":
        kept = {name: value for name, value in rope.items() if name in ("rope_theta", "partial_rotary_factor")}
        config.rope_parameters = kept | {"rope_type": "default"}
    if not hasattr(config, "rms_norm_eps"):
        default = _OLMO_EPSILON if config.model_type == "olmo" else 1e-6
        config.rms_norm_eps = getattr(config, "layer_norm_eps", getattr(config, "norm_eps", default))


def mend(graph: ir.Graph, config: Any) -> None:
    """Makes the builder's graph that of the torch model with `config`, in place, where no words would help. The rules:

    1. Gemma's embeddings are scaled by √width; the builder rounds it to two decimals.
    2. OLMo's norms subtract the mean; the builder's are RMS norms.
    3. OLMo clips queries, keys and values to ± clip_qkv; the builder doesn't.
    """
    if config.model_type in ("gemma", "gemma2", "gemma3_text"):
        scaled = graph.node("/model/embed_tokens/Mul")
        scaled.replace_input_with(1, _scalar(graph, scaled, config.hidden_size**0.5))
    if config.model_type == "olmo":
        for node in graph:
            node.op_type = _WITH_MEAN.get(node.op_type, node.op_type)
        if config.clip_qkv is not None:
            _clip(graph, config.clip_qkv)


_WITH_MEAN = {
    "SimplifiedLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SkipLayerNormalization",
}


def _clip(graph: ir.Graph, limit: float) -> None:
    for prefix, (_, last) in linear_nodes(graph).items():
        if prefix.rpartition("/")[2] in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
            limits = [_scalar(graph, last, value) for value in (-limit, limit)]
            node = ir.node("Clip", [last.outputs[0], *limits], name=f"{prefix}/Clip")
            put_behind(graph, last, node, f"{prefix}/output", f"{prefix}/Clip/output_0")


def _scalar(graph: ir.Graph, near: ir.Node, value: float) -> ir.Value:
    """A constant of the type of `near`'s output, before it; few and small, they stay in the file of the graph."""
    dtype = near.outputs[0].dtype
    assert dtype is not None
    name = f"{near.name}/{value}"
    node = ir.node("Constant", [], {"value": ir.tensor(value, dtype=dtype)}, name=name)
    graph.insert_before(near, node)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, dtype, ir.Shape([])
    return node.outputs[0]


def rotations(model: torch.nn.Module) -> dict[str, Rotation]:
    """How `model` rotates positions, where not in the plainest way: ending of the builder's table -> Rotation."""
    found: dict[str, Rotation] = {}
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        if not name.endswith("rotary_emb") or kinds is None:
            continue
        for kind, how in kinds.items() if isinstance(kinds, dict) else [("", kinds)]:
            if how not in ("default", "longrope"):
                prefix = f"{kind}_" if kind else ""
                frequencies = getattr(module, f"{prefix}inv_freq").detach().float().cpu().numpy()
                scale = float(getattr(module, f"{prefix}attention_scaling"))
                found[_CACHE_OF_LAYERS.get(kind, "")] = frequencies, scale
    return found


def write_rotations(graph: ir.Graph, folder: Path, wanted: Mapping[str, Rotation]) -> None:
    """Gives the tables of cosines and sines (positions, half the rotated width) what `wanted` says, in their files."""
    for ending, (frequencies, scale) in wanted.items():
        for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin)):
            value = graph.initializers[f"{name}{ending}"]
            tensor = value.const_value
            assert tensor is not None
            positions, width = tensor.shape.numpy()
            assert width == len(frequencies)
            angles = np.outer(np.arange(positions, dtype=np.float32), frequencies)
            table = (function(angles) * np.float32(scale)).astype(tensor.dtype.numpy())
            if isinstance(tensor, ir.ExternalTensor):
                with (folder / tensor.location).open("r+b") as file:
                    file.seek(tensor.offset or 0)
                    file.write(table.tobytes())
            else:
                value.const_value = ir.tensor(table, name=value.name)
