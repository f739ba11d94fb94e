"""What a row of a model's main input is: tokens, an image's pixels, or sound as a wave or a spectrogram."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["MAIN_INPUTS", "main_input", "row_shape", "takes_mask", "wave_length"]

MAIN_INPUTS = ("input_ids", "pixel_values", "input_values")


def main_input(model: PreTrainedModel, name: str) -> str:
    """The one of `MAIN_INPUTS` that `model`, of the base `name`, can't do without. Raises UserError for others."""
    main = model.main_input_name
    # The configuration of a model that takes several things together, such as CLIP, has none of its own.
    several = main == "input_ids" and not isinstance(getattr(model.config, "vocab_size", None), int)
    if several or main not in MAIN_INPUTS:
        taken = "several kinds of input together" if several else repr(main)
        raise UserError(
            f"The base model {name} ({type(model).__name__}) takes {taken}, which this version can't export. Expected "
            "a model of texts (input_ids), images (pixel_values) or sound (input_values)."
        )
    return main


def row_shape(config: PreTrainedConfig, source: Source, main: str) -> tuple[int, ...]:
    """What every row of the input `main` has: (channels, H, W) of images, (frames, mels) of spectrograms.

    () where rows differ in length: tokens, and sound as a wave. A network of convolutions alone (ResNet) has no size of
    its own: the preprocessor of the base says which one it was trained on.
    """
    if main == "pixel_values":
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", None) or _processor_size(source)
        if size is None:
            raise UserError(
                f"The base model {source} doesn't say how large its images are: neither config.json (image_size) nor "
                'preprocessor_config.json (size). Save its image processor beside it, or add "image_size": PIXELS to '
                "its config.json."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return (getattr(config, "num_channels", 3), height, width)
    if main == "input_values" and not _takes_waves(config):
        try:
            return (config.max_length, config.num_mel_bins)
        except AttributeError as error:
            raise UserError(
                f"The base model {source} takes sound in a form that this version can't export. Expected waves, as "
                "Wav2Vec2, HuBERT and WavLM take them, or spectrograms of one size, as AST does."
            ) from error
    return ()


def takes_mask(config: PreTrainedConfig, source: Source) -> bool:
    """Whether sound comes with an attention_mask: models with group norm are trained on zeros behind short waves."""
    from transformers.models.auto.feature_extraction_auto import get_feature_extractor_config

    if not _takes_waves(config):
        return False
    wanted = get_feature_extractor_config(source.name, revision=source.revision).get("return_attention_mask")
    return getattr(config, "feat_extract_norm", "") == "layer" if wanted is None else bool(wanted)


def wave_length(config: PreTrainedConfig, frames: int) -> int:
    """The fewest samples of which the convolutions in front of the encoder make `frames` frames."""
    length = frames
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        length = (length - 1) * stride + kernel
    return length


def _takes_waves(config: PreTrainedConfig) -> bool:
    return hasattr(config, "conv_kernel") and hasattr(config, "conv_stride")


def _processor_size(source: Source) -> tuple[int, int] | None:
    """(H, W) of what the image processor of `source` puts out, None where there is none."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    settings: dict[str, Any] = get_image_processor_config(source.name, revision=source.revision)
    size = (settings.get("crop_size") if settings.get("do_center_crop") else None) or settings.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        height, width = (size.get(side, size.get("shortest_edge")) for side in ("height", "width"))
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    return None
