"""What a vision-language model does with images, as graphs beside its decoder, for onnxruntime-genai to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from ..adapters.adapter import Adapter
from ..errors import UserError, some
from ..formats.images import EMBEDDING_FILE, EMBEDS, FEATURES, PIXELS, VISION_FILE
from ..formats.manifest import LayerRow
from ..genai.generate import CONFIG_FILE
from .adapted import fold, layer_rows
from .graph import finish
from .options import DEFAULT_OPSET, ExportOptions
from .stages import calling

if TYPE_CHECKING:
    from ..pytorch.base import BaseModel

__all__ = ["FILES", "exports_images", "fold_seeing", "name_images", "write_images"]

FILES = tuple(f"{name}{ending}" for name in (VISION_FILE, EMBEDDING_FILE) for ending in ("", ".data"))

_FAMILIES = ("mistral3",)
"""Those of which onnxruntime-genai computes with an image what PyTorch computes: docs/vision-language.md."""


def exports_images(base: BaseModel, options: ExportOptions) -> bool:
    """Whether the export of `base` sees images: of a proven family, where it is proven, and with a fixed adapter.

    With images onnxruntime-genai 0.18 takes an active adapter without a word and runs the decoder without it.
    """
    fixed = options.swappable is None
    return fixed and options.device == "cpu" and base.model.config.model_type in _FAMILIES


def fold_seeing(base: BaseModel, seeing: Adapter) -> list[LayerRow]:
    """Folds `seeing`, what an adapter changes outside of the language part, into `base`, in place.

    Returns the manifest's rows of it. Raises UserError where it doesn't fold into weights.
    """
    if filters := [name for name, layer in seeing.layers.items() if layer.tau is not None]:
        raise UserError(
            f"The adapter {seeing.path} has task-aware filters on what sees images ({some(filters)}): a filter doesn't "
            f"fold into weights, and {VISION_FILE} has no operators. Train it with filters on the language part alone "
            "(filter_target_modules)."
        )
    fold(base.model, seeing, merge=True)
    return layer_rows(seeing, {})


def write_images(base: BaseModel, folder: Path, step: Callable[[str], None]) -> None:
    """Writes the graphs of `base` into `folder`. Its vision tower, projector and embeddings are float32 afterwards.

    One image at a time, of any height and width that are multiples of a token's edge. Raises UserError where torch
    can't trace them.
    """
    step("tracing what sees images")
    model, config = base.model, base.model.config
    parts, table = model.model, model.get_input_embeddings()
    for module in (parts.vision_tower, parts.multi_modal_projector, table):
        module.float()
    edge = config.vision_config.patch_size * config.spatial_merge_size
    most = max(config.vision_config.image_size // edge, 4)
    wanted = config.vision_feature_layer

    def see(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        # As get_image_features, for one image, whose size is the tensor's own.
        sizes = [(pixel_values.shape[2], pixel_values.shape[3])]
        states = parts.vision_tower(
            pixel_values, image_sizes=sizes, output_hidden_states=True, return_dict=True
        ).hidden_states
        layers = [wanted] if isinstance(wanted, int) else wanted
        chosen = torch.cat([states[layer] for layer in layers], dim=-1)
        return {FEATURES: parts.multi_modal_projector(chosen.squeeze(0), sizes)}

    def embed(input_ids: torch.Tensor, image_features: torch.Tensor) -> dict[str, torch.Tensor]:
        # The k-th token of an image is the k-th feature; where there is none, it is its own embedding.
        own = table(input_ids)
        marks = input_ids == config.image_token_id
        order = marks.reshape(-1).to(torch.int64).cumsum(0).reshape(marks.shape) - 1
        count = image_features.shape[0]
        rows = torch.cat([image_features, own.new_zeros((1, own.shape[-1]))])
        place = torch.minimum(order.clamp(min=0), torch.full_like(order, count))
        return {EMBEDS: torch.where((marks & (order < count))[..., None], rows[place], own)}

    sides = {axis: edge * torch.export.Dim(name, min=1, max=most) for axis, name in ((2, "rows"), (3, "columns"))}
    auto = torch.export.Dim.AUTO
    pixels = torch.zeros((1, config.vision_config.num_channels, 3 * edge, 4 * edge))
    _write(base, see, {PIXELS: pixels}, {PIXELS: sides}, folder / VISION_FILE)
    tokens = {"input_ids": torch.full((2, 9), config.image_token_id), FEATURES: torch.zeros((5, table.embedding_dim))}
    _write(base, embed, tokens, {"input_ids": {0: auto, 1: auto}, FEATURES: {0: auto}}, folder / EMBEDDING_FILE)


def _write(
    base: BaseModel, forward: Callable[..., Any], inputs: Mapping[str, Any], shapes: Mapping[str, Any], out: Path
) -> None:
    config = OnnxConfig(dynamic_shapes=dict(shapes), opset_version=DEFAULT_OPSET)
    try:
        with calling(base.model, forward):
            program = OnnxExporter().export(base.model, dict(inputs), config=config).program
    except Exception as error:  # torch.export raises many classes
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"What sees images in the {type(base.model).__name__} can't be traced to ONNX: {said}. It may need a newer "
            "transformers or torch; families proven with this version are in docs/vision-language.md."
        ) from error
    finish(program, DEFAULT_OPSET)
    ir.save(program, out, external_data=f"{out.name}.data")


def name_images(folder: Path, config: Any) -> None:
    """Says in genai_config.json which graphs there are beside the decoder, and which token stands for an image's."""
    path = folder / CONFIG_FILE
    content = json.loads(path.read_text())
    content["model"] |= {
        "image_token_id": config.image_token_id,
        "vision": {
            "filename": VISION_FILE,
            "inputs": {PIXELS: PIXELS},
            "outputs": {FEATURES: FEATURES},
            "patch_size": config.vision_config.patch_size,
            "spatial_merge_size": config.spatial_merge_size,
        },
        "embedding": {
            "filename": EMBEDDING_FILE,
            "inputs": {"input_ids": "input_ids", FEATURES: FEATURES},
            "outputs": {EMBEDS: EMBEDS},
        },
    }
    path.write_text(json.dumps(content, indent=4) + "\n")
