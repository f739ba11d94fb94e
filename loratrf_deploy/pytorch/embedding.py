"""Embeddings: what an adapter, or its base, declares of them, and what they are by PyTorch's tokens."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..formats.embedding import MODULES_FILE, Embedding, read_modules
from .base import BaseModel

__all__ = ["as_embedder", "declared", "pooled"]


def as_embedder(adapter: Adapter) -> Adapter:
    """`adapter`, one without a task_type as one for embeddings: that of a decoder would pass for a language model's."""
    return dataclasses.replace(adapter, task_type=adapter.task_type or "FEATURE_EXTRACTION")


def declared(adapter: Adapter, base: BaseModel) -> Embedding | None:
    """What modules.json says: the adapter's own, which it was trained with, else that of `base`, in a folder or a hub.

    None where neither has one. Raises UserError for one that says what nothing here computes.
    """
    if os.path.lexists(adapter.path / MODULES_FILE):
        return read_modules(adapter.path)
    if os.path.isdir(base.path):
        folder = Path(base.path)
        return read_modules(folder) if os.path.lexists(folder / MODULES_FILE) else None
    found = _cached(base, MODULES_FILE)
    return read_modules(Path(found).parent, lambda name: _cached(base, name)) if found else None


def _cached(base: BaseModel, file: str) -> str | None:
    """Where a file of the hub's `base` is in the cache, fetched where need be; None where it can't be had."""
    from transformers.utils import cached_file

    try:
        return cached_file(base.path, file, revision=base.revision)
    except Exception:  # no such name, no such file: errors come in many classes
        return None


def pooled(hidden: NDArray[np.float32], mask: NDArray[np.int64], embedding: Embedding) -> NDArray[np.float64]:
    """`embedding` of each row, (B,W), in float64: row by row and token by token, as its formula says.

    hidden (B,S,H), mask (B,S).
    """
    rows = []
    for tokens, own in zip(hidden.astype(np.float64), mask.astype(bool), strict=True):
        kept = tokens[own] if own.any() else np.zeros_like(tokens[:1])
        row = {"mean": kept.mean(0), "cls": kept[0], "last": kept[-1]}[embedding.pooling]
        row = row[: embedding.dimensions]
        rows.append(row / max(np.linalg.norm(row), 1e-12) if embedding.normalize else row)
    return np.stack(rows)
