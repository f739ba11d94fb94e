"""What parity adds for models that see: prompts with images, and what the graphs beside the decoder make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..formats.images import EMBEDDING_FILE, EMBEDS, FEATURES, IMAGE_SIZES, PIXELS, VISION_FILE
from ..pytorch.base import Inputs
from ..runtime.session import create_session

__all__ = ["image_batches", "image_prompt", "token_edge", "with_images"]

_PROMPTS = (((2, 3),), ((3, 1), (2, 4)))
"""Height and width of each prompt's images, in tokens."""


def image_batches(config: Any) -> list[Inputs]:
    """Random prompts with one image, and with two of different size, the same ones on every call."""
    return [image_prompt(config, sizes, seed) for seed, sizes in enumerate(_PROMPTS)]


def token_edge(config: Any) -> int:
    """Height and width, in pixels, of what one token stands for."""
    return int(config.vision_config.patch_size * config.spatial_merge_size)


def image_prompt(config: Any, sizes: Sequence[tuple[int, int]], seed: int) -> Inputs:
    """input_ids and attention_mask (1,S), with as many tokens for each image as it has, pixel_values, image_sizes.

    `config` is the model's, `sizes` are each image's height and width in tokens.
    """
    rng, image = np.random.default_rng(seed), config.image_token_id
    words = rng.integers(3, config.text_config.vocab_size, (len(sizes) + 1, 5))
    words[words == image] = 2
    pieces = [words[0]]
    for (height, width), after in zip(sizes, words[1:], strict=True):
        pieces += [np.full(height * width, image), after]
    ids = np.concatenate(pieces).astype(np.int64)[None]
    pixels = np.array(sizes, np.int64) * token_edge(config)
    values = np.zeros((len(sizes), config.vision_config.num_channels, *pixels.max(axis=0)), np.float32)
    for own, (height, width) in zip(values, pixels, strict=True):
        own[:, :height, :width] = rng.standard_normal((len(own), height, width))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), PIXELS: values, IMAGE_SIZES: pixels}


def with_images(model: Path, batches: Sequence[Inputs]) -> list[Inputs]:
    """The batches with what the graphs beside `model` make of them: inputs_embeds (batch, sequence, width).

    Raises UserError where ONNX Runtime doesn't run them.
    """
    vision, embedding = (create_session(model.with_name(name), library=False) for name in (VISION_FILE, EMBEDDING_FILE))
    width = next(value.shape[-1] for value in embedding.get_inputs() if value.name == FEATURES)
    made = []
    try:
        for batch in batches:
            images = zip(batch.get(PIXELS, ()), batch.get(IMAGE_SIZES, ()), strict=True)
            seen = [
                vision.run([FEATURES], {PIXELS: own[None, :, :height, :width_]})[0] for own, (height, width_) in images
            ]
            features = np.concatenate(seen) if seen else np.zeros((0, width), np.float32)
            feeds = {"input_ids": batch["input_ids"], FEATURES: features}
            made.append({**batch, EMBEDS: embedding.run([EMBEDS], feeds)[0]})
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise UserError(f"ONNX Runtime fails in {model.with_name(VISION_FILE)} or {EMBEDDING_FILE}: {error}") from error
    return made
