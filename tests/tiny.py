"""Small random base models and adapters on disk, made once per session and shared by the tests.

Nothing in them is zero or one by habit: biases, LayerNorm weights and both halves of every adapter are random, so that
a test can't pass because a term that was dropped happened to be zero.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

FAMILIES = ("bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2", "vit")
TASKS = {
    "text-classification": ("AutoModelForSequenceClassification", "SEQ_CLS", "classifier"),
    "token-classification": ("AutoModelForTokenClassification", "TOKEN_CLS", "classifier"),
    "question-answering": ("AutoModelForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
    "feature-extraction": ("AutoModel", "FEATURE_EXTRACTION", None),
    "image-classification": ("AutoModelForImageClassification", None, "classifier"),
}
TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "electra": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv", "Wo"],
    "deberta-v2": ["query_proj", "value_proj"],
    "vit": ["q_proj", "v_proj"],
}
SENTENCES = [
    "a gripping film that never lets go of the viewer",
    "the plot is thin and the jokes are older than the cast",
    "what a wonderful evening , and how short it was !",
    "where is the library ? it is behind the old town hall .",
    "rain fell on the harbour while the boats came home",
    "she wrote 3 letters , sent 2 and kept 1",
]


def make_base(
    path: str | Path, family: str = "bert", task: str = "text-classification", seed: int = 0, **sizes: Any
) -> Path:
    """Saves a random model of `family` with the head of `task`, and its tokenizer, in the folder `path`; returns it.

    `sizes` are fields of the family's configuration (hidden_size=64, num_labels=5, ...). DistilBERT's own names for the
    sizes are translated.
    """
    import transformers

    path = Path(path)
    values: dict[str, Any] = {
        "hidden_size": 32,
        # Tracing takes most of the suite's time; two layers only where there is something between layers to see.
        "num_hidden_layers": 2 if family in ("bert", "modernbert") else 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_labels": 2 if task == "question-answering" else 3,
    }
    if family == "vit":
        values |= {"image_size": 16, "patch_size": 4}
    else:
        tokenizer = make_tokenizer(family)
        values |= {"vocab_size": len(tokenizer), "max_position_embeddings": 66, "pad_token_id": tokenizer.pad_token_id}
    if family == "electra":
        values["embedding_size"] = 24
    if family == "modernbert":
        # One layer of each kind: global attention, and a local window narrower than the longest test sequence.
        values |= {"global_attn_every_n_layers": 2, "local_attention": 16}
        values |= dict.fromkeys(("cls_token_id", "bos_token_id"), tokenizer.cls_token_id)
        values |= dict.fromkeys(("sep_token_id", "eos_token_id"), tokenizer.sep_token_id)
    if family == "deberta-v2":
        # As in the published checkpoints: disentangled attention with shared projections and log buckets.
        values |= {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
            "pooler_hidden_size": sizes.get("hidden_size", values["hidden_size"]),
        }
    values |= sizes
    if family == "distilbert":
        renamed = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        renamed |= {"intermediate_size": "hidden_dim"}
        values = {renamed.get(name, name): value for name, value in values.items()}
    config = transformers.CONFIG_MAPPING[family](**values)
    model = getattr(transformers, TASKS[task][0]).from_config(config)
    randomise(model, seed)
    model.save_pretrained(path)
    if family == "vit":
        processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    else:
        tokenizer.save_pretrained(path)
    return path


def make_adapter(
    base_path: str | Path,
    path: str | Path,
    kind: str = "lora",
    r: int = 4,
    filter_rank: int = 3,
    seed: int = 1,
    for_task: str | None = None,
    labels: int | None = None,
    **config: Any,
) -> Path:
    """Saves a random `kind` ("lora" or "loratrf") adapter for the base in `base_path` through PEFT; returns `path`.

    `config` are further fields of LoraConfig or LoraTrfConfig. Targets, task type and the saved head follow the base,
    or the task `for_task`. `labels` are those of its head, where the base has others.
    """
    import transformers

    base_path, path = Path(base_path), Path(path)
    base_config = transformers.AutoConfig.from_pretrained(base_path)
    architecture = (base_config.architectures or ["?"])[0]
    task = for_task or next(
        (
            name
            for name, (auto, _, _) in TASKS.items()
            if auto != "AutoModel" and architecture.endswith(auto.removeprefix("AutoModel"))
        ),
        "feature-extraction",
    )
    auto, task_type, head = TASKS[task]
    values: dict[str, Any] = {
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": TARGETS.get(base_config.model_type),
        "task_type": task_type,
        "modules_to_save": [head] if head else None,
    }
    sizes = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    model = getattr(transformers, auto).from_pretrained(base_path, **sizes)
    return save_adapter(model, path, kind, seed, filter_rank, values | config)


def save_adapter(model: Any, path: Path, kind: str, seed: int, filter_rank: int, config: dict[str, Any]) -> Path:
    """Saves a random `kind` adapter of `model` in `path`; returns it."""
    import peft

    if kind == "loratrf":
        from loratrf_deploy.peft import LoraTrfConfig as Config

        config = {"filter_rank": filter_rank, "filter_gamma": 1.0} | config
    else:
        from peft import LoraConfig as Config
    adapted = peft.get_peft_model(model, Config(**config))
    randomise(adapted, seed, trainable_only=True)
    adapted.save_pretrained(str(path))
    return path


def randomise(model: nn.Module, seed: int, trainable_only: bool = False) -> None:
    """Gives every parameter of `model` (or the trainable ones) random values at the scale a trained one has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if trainable_only and not value.requires_grad:
                continue
            noise = torch.randn(value.shape, generator=generator)
            last = name.rsplit(".", 1)[-1]
            if "norm" in name.lower() and last == "weight":
                value.copy_(1 + 0.2 * noise)
            elif last == "bias":
                value.copy_(0.1 * noise)
            elif "embeddings" in name or value.dim() <= 1:
                value.copy_(0.5 * noise)
            else:
                # Below the gain of 1 that keeps variance: residual streams and attention stay as calm as trained ones,
                # which float16 needs; an adapter changes its layer by about a third.
                gain = 0.3 if trainable_only else 0.7
                value.copy_(gain * noise / value[0].numel() ** 0.5)


def make_tokenizer(family: str) -> Any:
    """A WordPiece tokenizer trained on SENTENCES (byte-level BPE for RoBERTa, ModernBERT), special tokens as usual."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    roberta = family == "roberta"
    pad, unknown, start, end, mask = (
        ("<pad>", "<unk>", "<s>", "</s>", "<mask>") if roberta else ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    )
    # RoBERTa's padding id is 1 and its positions start behind it.
    special = [start, pad, end, unknown, mask] if roberta else [pad, unknown, start, end, mask]
    if roberta or family == "modernbert":
        tokenizer = Tokenizer(models.BPE(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    middle = f"{end} {end}" if roberta else f"{end}"
    types = (0, 0) if roberta else (0, 1)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A:{types[0]} {middle} $B:{types[1]} {end}:{types[1]}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    if family not in ("bert", "electra", "deberta-v2"):
        names.remove("token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        cls_token=start,
        sep_token=end,
        mask_token=mask,
        model_max_length=64,
        model_input_names=names,
    )


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
"""Of one layer, as most configurations call them."""
WAVES = SIZES | {
    "conv_dim": (16, 16),
    "conv_kernel": (5, 3),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
"""Of Wav2Vec2's kind."""


def bert(dtype: torch.dtype = torch.float32) -> Any:
    """In memory, 16 wide, with biases, which transformers starts at zero."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=20, num_labels=3, **sizes)
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.eval().to(dtype)


def gpt2() -> Any:
    """In memory, as wide; its linear layers are Conv1D, whose weights are transposed."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def conv1d_layers(model: nn.Module) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {name for name, part in model.named_modules() if isinstance(part, Conv1D)}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
