"""Random rows of a model's own sizes: tokens, images, waves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .shapes import SMALLEST_IMAGE, wave_length

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["images", "max_sequence", "tokens", "waves"]

Rows = dict[str, NDArray[Any]]


def tokens(
    config: PreTrainedConfig, rng: np.random.Generator, batch: int, sequence: int, *, padding: bool, ends: bool
) -> Rows:
    """input_ids, attention_mask and token_type_ids (batch, sequence) int64; with `ends`, <eos> is each row's last."""
    sequence = min(sequence, max_sequence(config) or sequence)
    pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    ids = rng.integers(0, config.vocab_size, (batch, sequence))
    # RoBERTa counts positions by ids that aren't padding: a padding id inside a sentence never comes from a tokenizer.
    ids = np.where(ids == pad, (pad + 1) % config.vocab_size, ids)
    lengths = _lengths(rng, batch, 1, sequence, padding=padding and sequence > 1)
    mask = (np.arange(sequence) < lengths[:, None]).astype(np.int64)
    end = getattr(config, "eos_token_id", None)
    if ends and isinstance(end, int) and end < config.vocab_size:
        ids = np.where(ids == end, (end + 1) % config.vocab_size, ids)
        ids[np.arange(batch), lengths - 1] = end
    ids = np.where(mask == 1, ids, pad)
    types = max(int(getattr(config, "type_vocab_size", 1) or 1), 1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": np.sort(rng.integers(0, types, ids.shape), axis=1),
    }


def images(
    rng: np.random.Generator, batch: int, row_shape: Sequence[int], *, any_size: bool, padding: bool, first: bool
) -> Rows:
    """pixel_values (batch, channels, H, W) and pixel_mask (batch, H, W).

    With `any_size`, all but the `first` batch are of another size, between a half and the whole of `row_shape`; then,
    with `padding`, every image but the first ends before the batch does, below and on the right.
    """
    channels, *size = row_shape
    if any_size and not first:
        size = [int(rng.integers(max(side // 2, min(side, SMALLEST_IMAGE)), side + 1)) for side in size]
    pixels = rng.standard_normal((batch, channels, *size), dtype=np.float32)
    inside = [
        np.arange(side) < _lengths(rng, batch, side // 2, side, padding=padding and any_size)[:, None] for side in size
    ]
    mask = (inside[0][:, :, None] & inside[1][:, None]).astype(np.int64)
    return {"pixel_values": pixels * mask[:, None].astype(np.float32), "pixel_mask": mask}


def waves(config: PreTrainedConfig, rng: np.random.Generator, batch: int, frames: int, *, padding: bool) -> Rows:
    """input_values and attention_mask (batch, samples) of which the model makes `frames` frames."""
    # Not the fewest for so many frames: lengths of waves are odd.
    longest = wave_length(config, frames) + int(rng.integers(config.conv_stride[0]))
    values = rng.standard_normal((batch, longest), dtype=np.float32)
    lengths = _lengths(rng, batch, wave_length(config, 1), longest, padding=padding and frames > 1)
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    return {"input_values": values * mask.astype(np.float32), "attention_mask": mask}


def max_sequence(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the position embeddings hold, None where nothing bounds it."""
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_target_positions", None))
    if not isinstance(positions, int) or positions <= 0:
        return None
    # RoBERTa's positions start behind its padding index.
    offset = (config.pad_token_id or 0) + 1 if config.model_type in _ROBERTA_POSITIONS else 0
    return positions - offset


_ROBERTA_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "data2vec-text", "mpnet"}


def _lengths(rng: np.random.Generator, batch: int, least: int, most: int, *, padding: bool) -> NDArray[np.int64]:
    """Each row's own length, the first one's `most`; without `padding` all are."""
    if not padding:
        return np.full(batch, most)
    lengths = rng.integers(least, most, batch)
    lengths[0] = most
    return lengths
