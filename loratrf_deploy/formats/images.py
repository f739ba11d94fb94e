"""The graphs beside a language model that sees: one makes features of an image, one puts them among the tokens."""

from __future__ import annotations

from typing import Any

__all__ = ["EMBEDDING_FILE", "EMBEDS", "FEATURES", "IMAGE_SIZES", "PIXELS", "VISION_FILE", "takes_images"]

VISION_FILE, EMBEDDING_FILE = "vision.onnx", "embedding.onnx"
PIXELS, FEATURES, EMBEDS = "pixel_values", "image_features", "inputs_embeds"
"""What the first takes and gives, (1, channels, H, W) -> (tokens, width), and what the second makes of it and of
input_ids, (batch, sequence, width): the decoder's input."""
IMAGE_SIZES = "image_sizes"
"""Height and width of each image (images, 2) in a batch that is padded to the largest."""


def takes_images(genai_config: Any) -> bool:
    """Whether the folder of this genai_config.json has both graphs, under the names that an export gives them."""
    parts = [(genai_config or {}).get("model", {}).get(part) for part in ("vision", "embedding")]
    names = [part.get("filename") if isinstance(part, dict) else None for part in parts]
    return names == [VISION_FILE, EMBEDDING_FILE]
