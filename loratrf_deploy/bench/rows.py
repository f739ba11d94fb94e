"""Random rows for an exported encoder, of what its graph takes and the config.json beside it says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..formats.settings import read_settings
from ..ops.schemas import ADAPTER_IDS
from ..pytorch.samples import max_sequence
from ..pytorch.shapes import LARGEST_IMAGE, wave_length

__all__ = ["random_prompts", "random_rows"]

_IMAGE, _CHOICES = 224, 2
"""Sides of images where nothing says what they are, and how many answers a question of multiple choice has."""
_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


def random_rows(
    folder: Path, inputs: Iterable[Any], batch: int, sequence: int, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """A value for each of `inputs` (names, types and shapes as onnxruntime has them) of the model in `folder`.

    `batch` rows of `sequence` tokens without padding, or of sound of which the model makes `sequence` frames; images
    have the size that the graph or the preprocessor says. Raises UserError for an input that is none of these, or a
    sequence over the model's positions.
    """
    settings = _settings(folder / "config.json")
    text: Any = SimpleNamespace(**(settings | dict(settings.get("text_config") or {})))
    for name in ("pad_token_id", "max_position_embeddings", "eos_token_id"):
        vars(text).setdefault(name, None)
    inputs = [value for value in inputs if value.name != ADAPTER_IDS]
    if "input_ids" in {value.name for value in inputs} and sequence > (most := max_sequence(text) or sequence):
        raise UserError(f"--sequence {sequence} is more than {folder} has positions for: {most}. Ask for fewer tokens.")
    sizes = {"sequence": sequence, "choices": _CHOICES}
    if any("samples" in value.shape for value in inputs):
        sizes["samples"] = wave_length(text, sequence)
    sides = _sides(folder)
    sizes |= {"height": sides[0], "width": sides[1]}
    rows = {}
    for value in inputs:
        shape = [_size(dim, batch, sizes, value.name, folder) for dim in value.shape]
        rows[value.name] = _values(value.name, shape, text, folder, rng).astype(_TYPES[value.type])
    return rows


def random_prompts(settings: Mapping[str, Any], batch: int, sequence: int, rng: np.random.Generator) -> list[list[int]]:
    """`batch` prompts of `sequence` tokens, none of them padding, for a model whose vocab_size `settings` says."""
    vocabulary, pad = settings.get("vocab_size"), settings.get("pad_token_id")
    if not isinstance(vocabulary, int) or vocabulary < 2:
        raise UserError(f"The model's configuration has the vocab_size {vocabulary!r}, expected a number of tokens.")
    ids = rng.integers(0, vocabulary, (batch, sequence))
    return np.where(ids == pad, (ids + 1) % vocabulary, ids).tolist()


def _settings(path: Path) -> dict[str, Any]:
    return read_settings(path) if path.is_file() else {}


def _size(dim: int | str, batch: int, sizes: dict[str, int], name: str, folder: Path) -> int:
    if isinstance(dim, int):
        return dim
    if dim.endswith("batch"):
        return batch
    if dim in sizes:
        return sizes[dim]
    raise UserError(f"{folder} takes {name} with a dimension {dim!r}, which loratrf-bench can't fill.")


def _values(
    name: str, shape: Sequence[int], text: SimpleNamespace, folder: Path, rng: np.random.Generator
) -> NDArray[Any]:
    if name in ("pixel_values", "input_values"):
        return rng.standard_normal(shape)
    if name in ("attention_mask", "pixel_mask"):
        return np.ones(shape)
    if name == "token_type_ids":
        return np.zeros(shape)
    vocabulary = getattr(text, "vocab_size", None)
    if name != "input_ids" or not isinstance(vocabulary, int) or vocabulary < 2:
        raise UserError(
            f"{folder} takes {name}, and its config.json doesn't say what that is. Expected an encoder as "
            "loratrf-export writes it, with config.json beside model.onnx."
        )
    ids = rng.integers(0, vocabulary, shape)
    ids = np.where(ids == text.pad_token_id, (ids + 1) % vocabulary, ids)
    if isinstance(end := text.eos_token_id, int) and 0 <= end < vocabulary:
        ids[..., -1] = end  # BART reads its answer there, at as many of them in every row
        ids[..., :-1] = np.where(ids[..., :-1] == end, (end + 1) % vocabulary, ids[..., :-1])
    return ids


def _sides(folder: Path) -> tuple[int, int]:
    """Height and width of what the image processor puts out."""
    size = _settings(folder / "preprocessor_config.json").get("size")
    given: dict[str, Any] = size if isinstance(size, dict) else {}
    sides = [given.get(side, given.get("shortest_edge")) for side in ("height", "width")]
    known = [side for side in sides if isinstance(side, int) and 0 < side <= LARGEST_IMAGE]
    return (known[0], known[1]) if len(known) == 2 else (_IMAGE, _IMAGE)
