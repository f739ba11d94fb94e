"""A transformers configuration as onnxruntime-genai's builder reads it: what it misreads or misses is put in its words.

The builder looks for attributes of older transformers and takes silence for a default, so a model comes out wrong
without a word: Mistral's sliding window lies in one field, and the builder asks for a kind by layer.
"""

from __future__ import annotations

from typing import Any

__all__ = ["in_builders_words"]


def in_builders_words(config: Any) -> None:
    """Changes `config`, which the builder alone reads, in place: same model, other words. The rules:

    1. A sliding window is one of layers: Mistral's and Phi-3's, which have no kinds of layers, is one of all.
    """
    if getattr(config, "sliding_window", None) is not None and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
