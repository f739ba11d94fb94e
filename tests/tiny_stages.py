"""Small random models that generate and that onnxruntime-genai's builder doesn't know, for the tests of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny import randomise, save_adapter
from tiny_llm import VOCABULARY, make_tokenizer

ANSWERS = ("t5", "bart", "marian", "whisper")
CAUSAL = ("gpt2", "opt", "falcon", "gpt_neox", "bloom", "olmo2", "starcoder2", "mixtral", "qwen2_moe", "glm4")
TARGETS: dict[str, list[str]] = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "falcon": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "olmo2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "starcoder2": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2_moe": ["q_proj", "k_proj", "v_proj", "o_proj", "shared_expert.gate_proj", "shared_expert.down_proj"],
    "glm4": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "marian": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "whisper": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
"""Every linear layer that PEFT reaches, by the names that users give in target_modules."""

_HIDDEN, _HEADS, _INNER = 32, 4, 48
_USUAL = {
    "hidden_size": _HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": _HEADS,
    "intermediate_size": _INNER,
    "max_position_embeddings": 160,
}
_BART = {
    "d_model": _HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": _HEADS,
    "decoder_attention_heads": _HEADS,
    "encoder_ffn_dim": _INNER,
    "decoder_ffn_dim": _INNER,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": _HIDDEN, "n_layer": 2, "n_head": _HEADS, "n_positions": 160},
    "opt": {"ffn_dim": _INNER, "word_embed_proj_dim": _HIDDEN},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "bloom": {"n_layer": 2, "n_head": _HEADS},
    "olmo2": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 2},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2_moe": {"num_key_value_heads": 2, "num_experts": 4, "shared_expert_intermediate_size": 24, **_MOE},
    "glm4": {"num_key_value_heads": 2, "head_dim": 8},
    "t5": {"d_model": _HIDDEN, "d_kv": 8, "d_ff": _INNER, "num_layers": 2, "num_heads": _HEADS},
    "bart": {**_BART, "max_position_embeddings": 160, "forced_eos_token_id": 1, "forced_bos_token_id": 0},
    "marian": {**_BART, "max_position_embeddings": 160, "scale_embedding": True},
    # A second of sound, 16 bands: 100 frames, of which the encoder makes 50.
    "whisper": {**_BART, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 160},
}
SPOKEN: dict[str, Any] = {
    "is_multilingual": True,
    "lang_to_id": {"<|de|>": 289, "<|en|>": 290, "<|fr|>": 291},
    "task_to_id": {"transcribe": 292, "translate": 293},
    "no_timestamps_token_id": 294,
    "return_timestamps": False,
    "suppress_tokens": [4, 9, *range(289, 301)],
    "begin_suppress_tokens": [1, 40],
}
"""What generation_config.json of a small Whisper says beside what others' do; these tokens aren't the tokenizer's."""


def make_base(path: str | Path, family: str, seed: int = 0, **sizes: Any) -> Path:
    """Saves a random model of `family` and its tokenizer in the folder `path`; returns it.

    `sizes` are fields of the family's configuration.
    """
    import transformers

    path = Path(path)
    tokenizer = make_tokenizer()
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY + 13,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    answers = family in ANSWERS
    values |= {"decoder_start_token_id": tokenizer.pad_token_id} if answers else {}
    values |= {} if answers or family in ("gpt2", "bloom") else _USUAL
    values |= {"hidden_size": _HIDDEN} if family == "bloom" else {}
    config = transformers.CONFIG_MAPPING[family](**(values | _SIZES.get(family, {}) | sizes))
    model = _auto(family).from_config(config)
    randomise(model, seed)
    with torch.no_grad():
        # A head this large makes one token stand out, tied or not: greedy choices are no ties.
        model.get_output_embeddings().weight.mul_(4)
    # And left alone, small models say the same token for ever.
    model.generation_config.no_repeat_ngram_size = 2
    if family == "whisper":
        # One that was made of config.json isn't read back.
        for name, value in ({"_from_model_config": False} | SPOKEN).items():
            setattr(model.generation_config, name, value)
        transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(path)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _auto(family: str) -> Any:
    import transformers

    if family == "whisper":
        return transformers.AutoModelForSpeechSeq2Seq
    return transformers.AutoModelForSeq2SeqLM if family in ANSWERS else transformers.AutoModelForCausalLM


def in_memory() -> Any:
    """A model of one layer that is never saved."""
    import transformers

    sizes = {"vocab_size": 50, "n_embd": 8, "n_layer": 1, "n_head": 1, "bos_token_id": 0, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def make_adapter(base: str | Path, path: str | Path, kind: str = "lora", seed: int = 1, **config: Any) -> Path:
    """Saves a random `kind` ("lora" or "loratrf") adapter on every linear layer of `base`; returns `path`.

    `config` are fields of LoraConfig or LoraTrfConfig, which take precedence.
    """
    import transformers

    base, path = Path(base), Path(path)
    family = transformers.AutoConfig.from_pretrained(base).model_type
    values: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS[family],
        "task_type": "SEQ_2_SEQ_LM" if family in ANSWERS else "CAUSAL_LM",
    }
    if family == "gpt2":
        values["fan_in_fan_out"] = True
    return save_adapter(_auto(family).from_pretrained(base), path, kind, seed, 3, values | config)
