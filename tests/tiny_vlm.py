"""Small random vision-language models, tokenizers and adapters on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny import randomise, save_adapter
from tiny_llm import VOCABULARY, make_tokenizer

IMAGE = VOCABULARY - 1
"""The token that stands for a piece of an image."""
_LAYERS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w2",
    "in_proj_qkv",
    "in_proj_z",
]
LANGUAGE = rf".*(language_model|text_model)\..*layers.*\.({'|'.join(_LAYERS)})"

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}
_PATCHES = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}
_MARKS = {"video_token_id": VOCABULARY - 2, "vision_start_token_id": VOCABULARY - 3}
_MARKS |= {"image_token_id": IMAGE, "vision_end_token_id": VOCABULARY - 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
        _TOWER,
        {"mm_tokens_per_image": 16, "image_token_index": IMAGE, "tie_word_embeddings": True},
    ),
    "qwen2_5_vl": (
        {"head_dim": 8, "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
        _PATCHES,
        _MARKS,
    ),
    "qwen3_vl": (
        {"rope_parameters": _ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}},
        _PATCHES | {"deepstack_visual_indexes": [0]},
        _MARKS,
    ),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        _TOWER | {"model_type": "pixtral"},
        {"image_token_index": IMAGE, "spatial_merge_size": 2, "tie_word_embeddings": False},
    ),
    "llava": (
        {"model_type": "llama"},
        _TOWER | {"model_type": "clip_vision_model"},
        {"image_token_index": IMAGE, "tie_word_embeddings": False},
    ),
    "lfm2_vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        _TOWER | {"model_type": "siglip2_vision_model", "num_patches": 64},
        {"image_token_id": IMAGE},
    ),
    "qwen3_5": (
        {
            "vocab_size": VOCABULARY + 13,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": _ROPE
            | {"mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25},
            **{f"linear_num_{part}_heads": 2 for part in ("key", "value")},
            **{f"linear_{part}_head_dim": 16 for part in ("key", "value")},
        },
        _PATCHES | {"deepstack_visual_indexes": []},
        _MARKS,
    ),
    "qwen2_vl": (
        {"head_dim": 8, "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
        {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        _MARKS,
    ),
    "smolvlm": ({"model_type": "llama"}, _TOWER, {"image_token_id": IMAGE, "scale_factor": 2}),
    "paligemma": (
        {"model_type": "gemma"},
        _TOWER | {"model_type": "siglip_vision_model", "projection_dim": 32},
        {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32},
    ),
}
"""What the configuration of each family needs: of its texts, of its images, of both."""


def make_base(path: str | Path, family: str, seed: int = 0) -> Path:
    """Saves a random model of `family` and its tokenizer in the folder `path`; returns it."""
    import transformers

    path, tokenizer = Path(path), make_tokenizer()
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text, vision, both = FAMILIES[family]
    config = transformers.CONFIG_MAPPING[family](text_config=_TEXT | ends | text, vision_config=vision, **both)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    randomise(model, seed)
    with torch.no_grad():
        # An output head this large makes one token stand out: greedy choices are no ties.
        model.get_output_embeddings().weight.mul_(4)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_adapter(base: str | Path, path: str | Path, kind: str = "lora", seed: int = 1, **config: Any) -> Path:
    """Saves a random `kind` ("lora" or "loratrf") adapter on the language part of `base`; returns `path`.

    `config` are fields of LoraConfig or LoraTrfConfig, which take precedence.
    """
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    values = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE, "task_type": "CAUSAL_LM"}
    return save_adapter(model, Path(path), kind, seed, 3, values | config)
