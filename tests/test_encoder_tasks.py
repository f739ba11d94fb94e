"""Encoders' other tasks: masked words, letters of speech, choices, segments, boxes, and texts beside images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import transformers

import tiny
from conftest import Exported
from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.export.proven import ExportResult

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
WAVES = SIZES | {
    "conv_dim": (16, 16),
    "conv_kernel": (5, 3),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
    "vocab_size": 12,
    "pad_token_id": 0,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "is_gated_act": True}
VISION = SIZES | {"image_size": 16, "patch_size": 4}
SEGFORMER = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 5,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 6,
    "num_labels": 5,
}
ATTENTION = ["q_proj", "v_proj"]
TEXT = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
TYPES = {"token_type_ids": ["batch", "sequence"]}
SOUND = {"input_values": ["batch", "samples"], "attention_mask": ["batch", "samples"]}
LETTERS = {"logits": ["batch", "frames", 12]}
TOWERS = {
    "input_ids": ["text_batch", "sequence"],
    "attention_mask": ["text_batch", "sequence"],
    "pixel_values": ["image_batch", 3, 16, 16],
}
FOUR = {
    "logits_per_image": ["image_batch", "text_batch"],
    "logits_per_text": ["text_batch", "image_batch"],
    "text_embeds": ["text_batch", 16],
    "image_embeds": ["image_batch", 16],
}


class Kind(NamedTuple):
    """A class, the fields of its configuration, those of the adapter, and what the graph takes and gives."""

    model: str
    config: dict[str, Any]
    adapter: dict[str, Any]
    inputs: dict[str, list]
    outputs: dict[str, list]


KINDS = {
    "bert, masked words": Kind(
        "BertForMaskedLM", SIZES | {"num_hidden_layers": 2}, {"target_modules": ["query", "value"]}, TEXT | TYPES, {}
    ),
    "roberta, masked words": Kind("RobertaForMaskedLM", SIZES, {"target_modules": ["query", "value"]}, TEXT, {}),
    "modernbert, masked words": Kind("ModernBertForMaskedLM", SIZES, {"target_modules": ["Wqkv", "Wo"]}, TEXT, {}),
    "t5, its encoder": Kind(
        "T5EncoderModel",
        T5,
        {"target_modules": ["q", "v", "wo"], "task_type": "FEATURE_EXTRACTION"},
        TEXT,
        {"last_hidden_state": ["batch", "sequence", 32]},
    ),
    "wav2vec2, letters": Kind(
        "Wav2Vec2ForCTC", WAVES, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, SOUND, LETTERS
    ),
    "wavlm, letters": Kind("WavLMForCTC", WAVES, {"target_modules": ["v_proj", "intermediate_dense"]}, SOUND, LETTERS),
    "clip, both towers": Kind(
        "CLIPModel",
        {"projection_dim": 16},
        {"target_modules": [*ATTENTION, "text_projection", "visual_projection"]},
        TOWERS,
        FOUR,
    ),
    "clip, its texts": Kind(
        "CLIPTextModelWithProjection",
        SIZES | {"projection_dim": 16},
        {"target_modules": ATTENTION},
        TEXT,
        {"text_embeds": ["batch", 16], "last_hidden_state": ["batch", "sequence", 32]},
    ),
    "clip, its images": Kind(
        "CLIPVisionModelWithProjection",
        VISION | {"projection_dim": 16},
        {"target_modules": ATTENTION},
        {"pixel_values": ["batch", 3, 16, 16]},
        {"image_embeds": ["batch", 16], "last_hidden_state": ["batch", 17, 32]},
    ),
    "siglip, both towers": Kind(
        "SiglipModel", {}, {"target_modules": [*ATTENTION, "fc1"], "task_type": "FEATURE_EXTRACTION"}, TOWERS, FOUR
    ),
    "segformer, segments": Kind(
        "SegformerForSemanticSegmentation",
        SEGFORMER,
        {"target_modules": ATTENTION, "modules_to_save": ["decode_head"]},
        {"pixel_values": ["batch", 3, "height", "width"]},
        {},
    ),
    "detr, boxes": Kind(
        "DetrForObjectDetection",
        DETR,
        {"target_modules": ATTENTION, "modules_to_save": ["class_labels_classifier", "bbox_predictor"]},
        {"pixel_values": ["batch", 3, "height", "width"], "pixel_mask": ["batch", "height", "width"]},
        {"logits": ["batch", 6, 6], "pred_boxes": ["batch", 6, 4]},
    ),
    "bert, choices": Kind(
        "BertForMultipleChoice",
        SIZES,
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        {name: ["batch", "choices", "sequence"] for name in TEXT | TYPES},
        {"logits": ["batch", "choices"]},
    ),
}


def make_base(kind: Kind, folder: Path) -> Path:
    """A random model of `kind`, with its tokenizer or what makes its inputs of images and sound."""
    model_class = getattr(transformers, kind.model)
    values: dict[str, Any] = dict(kind.config)
    family = "bert" if kind.model.startswith("Bert") else "modernbert" if kind.model.startswith("Mod") else "roberta"
    if "pixel_values" not in kind.inputs or "input_ids" in kind.inputs:
        tokenizer = tiny.make_tokenizer(family)
        values |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} if "input_ids" in kind.inputs else {}
    if family == "modernbert":
        values |= dict.fromkeys(("cls_token_id", "bos_token_id"), tokenizer.cls_token_id)
        values |= dict.fromkeys(("sep_token_id", "eos_token_id"), tokenizer.sep_token_id)
    if "input_ids" in kind.inputs:
        tokenizer.save_pretrained(folder)
        text = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        if kind.model.startswith("CLIPText"):
            values |= text | {"eos_token_id": tokenizer.sep_token_id}
    if "image_batch" in str(kind.inputs):
        del values["vocab_size"], values["pad_token_id"]
        values |= {"text_config": SIZES | text | {"projection_size": 16, "max_position_embeddings": 40}, "vision_config": VISION}
        if kind.model == "SiglipModel":
            values["vision_config"] = VISION | {"hidden_size": 16}
            values["text_config"] |= {"projection_size": 16}
    if kind.model.startswith("Detr"):
        values["backbone_config"] = transformers.ResNetConfig(**RESNET)
    model = model_class(model_class.config_class(**values))
    tiny.randomise(model, 0)
    model.save_pretrained(folder)
    if "pixel_values" in kind.inputs:
        size = 64 if "height" in str(kind.inputs) else 16
        processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def axes(values: Any) -> dict[str, list]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }
