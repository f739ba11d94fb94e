"""The names that ONNX Runtime GenAI's model builder gives: to the modules of a torch model, and to caches."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["POSITION_IDS", "genai_name", "is_cache", "linear_nodes", "table_nodes"]

POSITION_IDS = "position_ids"
"""An input of graphs that rotate outside of attention; PyTorch counts by itself."""

_TABLES = ("embed_tokens", "wte", "embed_in", "tok_embeddings", "word_embeddings")
_ALIASES = {
    "attn": {"dense": "o_proj", "out_proj": "o_proj"},
    "linear_attn": {f"in_proj_{part}": f"{part}_proj" for part in ("qkv", "z", "b", "a")},
    "mlp": {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
}


def linear_nodes(graph: ir.Graph) -> dict[str, tuple[ir.Node, ir.Node]]:
    """Builder's module name ("/model/layers.0/attn/q_proj") -> (its MatMul or MatMulNBits, the node of its output).

    The second is the Add of the bias where there is one, else the first.
    """
    found = {}
    for node in graph:
        if node.op_type in ("MatMul", "MatMulNBits") and "/MatMul" in (node.name or ""):
            prefix = (node.name or "").rpartition("/")[0]
            adds = [user for user in node.outputs[0].consumers() if user.name == f"{prefix}/Add"]
            found[prefix] = (node, adds[0] if adds else node)
    return found


def table_nodes(graph: ir.Graph) -> dict[str, ir.Node]:
    """Builder's module name ("/model/embed_tokens") -> the Gather, or GatherBlockQuantized, that looks its rows up."""
    kinds = ("Gather", "GatherBlockQuantized")
    names = {node.name or "": node for node in graph if node.op_type in kinds}
    return {name.rpartition("/")[0]: node for name, node in names.items() if "/embed_tokens/" in name}


def genai_name(path: str) -> str | None:
    """The builder's name of the torch module `path`, None for what is no decoder layer's, and not the head or table.

    Of a vision-language model the layers are the language part's: a vision tower's are often called the same.
    """
    if path.rpartition(".")[2] in ("lm_head", "embed_out"):
        return "/lm_head"
    if re.fullmatch(rf"(?:\w+\.)?(?:language_model\.)?({'|'.join(_TABLES)})", path):
        return "/model/embed_tokens"
    if match := re.fullmatch(r"(?:\w+\.)?(?:language_model\.)?layers\.(\d+)\.(\w+)\.(\w+)", path):
        layer, group, name = match.groups()
        if group != "linear_attn":
            group = "attn" if "attn" in group or "attention" in group else "mlp" if group == "feed_forward" else group
        return f"/model/layers.{layer}/{group}/{_ALIASES.get(group, {}).get(name, name)}"
    return None


def is_cache(name: str) -> bool:
    """Whether a graph's input or output `name` is a cache of keys, values or convolutions, PyTorch's own affair."""
    return name.startswith(("past_key_values.", "past.", "present."))
