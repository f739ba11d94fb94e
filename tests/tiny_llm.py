"""Small random causal language models, tokenizers and adapters on disk, for the generation tests."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tiny import SENTENCES, randomise, save_adapter

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
ATTENTION = {
    "phi3": ["qkv_proj", "o_proj"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense"],
    "lfm2": ["q_proj", "k_proj", "v_proj", "in_proj", "out_proj"],
}
MLP = {
    "phi3": ["gate_up_proj", "down_proj"],
    "phi": ["fc1", "fc2"],
    "nemotron": ["up_proj", "down_proj"],
    "gpt_oss": list[str](),
    "lfm2": ["w1", "w2", "w3"],
}
WINDOW: dict[str, dict[str, Any]] = {
    "mistral": {},
    "phi3": {},
    "gemma2": {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}
"""Families with a sliding window, and what each needs beside `sliding_window`: all layers' or every other one's."""
VOCABULARY = 288


def targets(family: str) -> list[str]:
    """Every linear layer of a decoder layer, as users name them in target_modules."""
    attention = ATTENTION.get(family, ["q_proj", "k_proj", "v_proj", "o_proj"])
    return attention + MLP.get(family, ["gate_proj", "up_proj", "down_proj"])


def make_base(path: str | Path, family: str = "llama", seed: int = 0, **sizes: Any) -> Path:
    """Saves a random model of `family` and its tokenizer in the folder `path`; returns it.

    Grouped key/value heads, widths that are no multiple of each other, and random biases wherever the family has any.
    `sizes` are fields of the family's configuration.
    """
    import transformers

    path = Path(path)
    tokenizer = make_tokenizer()
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY + 13,  # more rows than tokens, as published checkpoints have
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    if family == "mistral":
        values["sliding_window"] = None
    if family == "phi3":
        values["original_max_position_embeddings"] = 256
        del values["head_dim"]
    if family == "phi":  # rotates half of a head: onnxruntime takes multiples of 16 values
        values |= {"hidden_size": 128, "partial_rotary_factor": 0.5}
        del values["head_dim"]
    if family == "nemotron":
        values |= {"hidden_size": 128, "head_dim": 32, "partial_rotary_factor": 0.5}
    if family == "gemma":  # always tied
        values["tie_word_embeddings"] = True
    config = transformers.CONFIG_MAPPING[family](**(values | sizes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    with torch.no_grad():
        # An output head this large makes one token stand out: greedy choices are no ties.
        model.get_output_embeddings().weight.mul_(4)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_adapter(base: str | Path, path: str | Path, kind: str = "lora", seed: int = 1, **config: Any) -> Path:
    """Saves a random `kind` ("lora" or "loratrf") adapter on every linear layer of `base`; returns `path`.

    `config` are fields of LoraConfig or LoraTrfConfig, which take precedence.
    """
    import transformers

    base, path = Path(base), Path(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    values: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": targets(model.config.model_type),
        "task_type": "CAUSAL_LM",
    }
    with warnings.catch_warnings():
        # What PEFT has to say about tied and adapted heads is what the tests are about.
        for message in ("Model has `tie_word_embeddings=True`", "Setting `save_embedding_layers` to `True`"):
            warnings.filterwarnings("ignore", message)
        return save_adapter(model, path, kind, seed, 3, values | config)


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on SENTENCES, as LLaMA-3's and Qwen's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )
