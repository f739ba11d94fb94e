"""What a row of a model's main inputs is: tokens, an image's pixels, or sound as a wave or a spectrogram."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    *("LARGEST_IMAGE", "MAIN_INPUTS", "SMALLEST_IMAGE", "any_size", "axes_of", "main_inputs", "row_shape"),
    *("takes_mask", "text_config", "wave_length"),
]

MAIN_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features")
SMALLEST_IMAGE = 32
"""Height and width of the smallest image for a model of any size: halved five times, one pixel is left."""
LARGEST_IMAGE = 16384


def main_inputs(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Those of `MAIN_INPUTS` that `model`, of the base `name`, can't do without: one, or a text's and an image's.

    Raises UserError for others.
    """
    main = model.main_input_name
    # The configuration of a model that takes several things together, such as CLIP, has none of its own.
    several = main == "input_ids" and not isinstance(getattr(model.config, "vocab_size", None), int)
    takes = inspect.signature(model.forward).parameters
    if several and model.can_generate():
        return ("input_ids",)  # a vision-language model answers texts without images too
    if several and hasattr(model, "get_image_features") and "spatial_shapes" not in takes:
        needs = [key for key in takes if key in MAIN_INPUTS]
        if needs == ["input_ids", "pixel_values"] and hasattr(model, "get_text_features"):
            return tuple(needs)
    # Of the models whose decoder answers to sound, Whisper alone is proven.
    answers = main == "input_features" or (main == "input_values" and model.config.is_encoder_decoder)
    other = answers and not (model.config.model_type == "whisper" and model.can_generate())
    if several or other or main not in MAIN_INPUTS:
        taken = "several kinds of input together" if several else repr(main)
        raise UserError(
            f"The base model {name} ({type(model).__name__}) takes {taken}, which this version can't export. Expected "
            "a model of texts (input_ids), images (pixel_values) or sound (input_values; Whisper), or of texts and "
            "images in two towers, such as CLIP."
        )
    return (main,)


def axes_of(name: str, rank: int, names: Collection[str]) -> tuple[str, ...]:
    """The axes of the input `name`, which has `rank` of them, of a model that takes `names`.

    Texts and images of two towers are counted apart.
    """
    towers = {"input_ids", "pixel_values"} <= set(names)
    if name == "pixel_values":
        return ("image_batch" if towers else "batch", "channels", "height", "width")
    if name == "pixel_mask":
        return ("batch", "height", "width")
    if name == "input_features":
        return ("batch", "mels", "frames")
    if "input_values" in names:
        return ("batch", "samples") if rank < 3 else ("batch", "frames", "mels")
    rows = "text_batch" if towers else "batch"
    return (rows, "choices", "sequence") if rank == 3 else (rows, "sequence")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config`, or the part of it that says what the texts of two towers are."""
    part: PreTrainedConfig = getattr(config, "text_config", config)
    return part


def any_size(config: PreTrainedConfig, task: str) -> bool:
    """Whether images may have any height and width: where what comes out lies in the image, and no size is built in."""
    return task in ("semantic-segmentation", "object-detection") and getattr(config, "image_size", None) is None


def row_shape(config: PreTrainedConfig, source: Source, mains: Collection[str]) -> tuple[int, ...]:
    """What every row of images or spectrograms among the inputs `mains` has: (channels, H, W), (frames, mels); of
    Whisper (mels, frames).

    () where rows differ in length: tokens, and sound as a wave. A network of convolutions alone (ResNet) has no size of
    its own: the preprocessor of the base says which one it was trained on.
    """
    if "pixel_values" in mains:
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", None) or _processor_size(source)
        if size is None:
            raise UserError(
                f"The base model {source} doesn't say how large its images are: neither config.json (image_size) nor "
                'preprocessor_config.json (size). Save its image processor beside it, or add "image_size": PIXELS to '
                "its config.json."
            )
        height, width = _two_sides(size, source)
        return (getattr(config, "num_channels", 3), height, width)
    if "input_features" in mains:
        # The second of the convolutions in front of the encoder makes one frame of two.
        return (config.num_mel_bins, 2 * config.max_source_positions)
    if "input_values" in mains and not _takes_waves(config):
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
    wanted = _settings(get_feature_extractor_config, source).get("return_attention_mask")
    return getattr(config, "feat_extract_norm", "") == "layer" if wanted is None else bool(wanted)


def wave_length(config: PreTrainedConfig, frames: int) -> int:
    """The fewest samples of which the convolutions in front of the encoder make `frames` frames."""
    length = frames
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        length = (length - 1) * stride + kernel
    return length


def _two_sides(size: Any, source: Source) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        sides = (0, 0)
    if not all(0 < side <= LARGEST_IMAGE for side in sides):
        raise UserError(
            f"The base model {source} has images of size {size!r}, by its config.json (image_size) or "
            f"preprocessor_config.json. Expected pixels, one number or two, up to {LARGEST_IMAGE}."
        )
    return sides[0], sides[1]


def _settings(read: Callable[..., Any], source: Source) -> dict[str, Any]:
    """What `read` finds in the settings of the processor of `source`, {} where there are none."""
    try:
        settings = read(source.name, revision=source.revision)
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__}, expected an object.")
    except Exception as error:  # damaged files, hub errors: many classes
        raise UserError(
            f"The settings of the base model {source}'s processor (preprocessor_config.json, processor_config.json) "
            f"can't be read: {error} Save the processor there again, AutoProcessor.from_pretrained(...)"
            ".save_pretrained(folder)."
        ) from error
    return settings


def _takes_waves(config: PreTrainedConfig) -> bool:
    return hasattr(config, "conv_kernel") and hasattr(config, "conv_stride")


def _processor_size(source: Source) -> tuple[int, int] | None:
    """(H, W) of what the image processor of `source` puts out, None where there is none."""
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    settings = _settings(get_image_processor_config, source)
    size = (settings.get("crop_size") if settings.get("do_center_crop") else None) or settings.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        height, width = (size.get(side, size.get("shortest_edge")) for side in ("height", "width"))
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    return None
