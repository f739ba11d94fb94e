"""Adapters of bases whose vocabulary was resized, which bring the embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import tiny
import tiny_llm
from loratrf_deploy import create_session, read_adapter
from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.pytorch.base import load_base
from loratrf_deploy.pytorch.oracle import load_reference
from shared import edit_tensors

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")  # that is what is meant
WORDS = ["dragon", "wyvern", "griffin"]
EMBEDDINGS = "bert.embeddings.word_embeddings"


def resized(base: Path, auto: Any, rows: int) -> Any:
    """The base as a training script resizes it, its new rows random: trained ones are."""
    model = auto.from_pretrained(base)
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for embedding in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            embedding.weight[before:].normal_(0, 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def encoder(make_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """(base, adapter, PEFT's model): with three tokens more than the base has, and the tokenizer that makes them."""
    base, _ = make_tiny(kind="lora")
    adapter = tmp_path_factory.mktemp("grown") / "adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(WORDS)
    model = resized(base, transformers.AutoModelForSequenceClassification, len(tokenizer))
    config = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    tiny.save_adapter(model, adapter, "lora", 1, 3, config)
    tokenizer.save_pretrained(adapter)
    trained = resized(base, transformers.AutoModelForSequenceClassification, len(tokenizer))
    return base, adapter, peft.PeftModel.from_pretrained(trained, adapter).eval()


@pytest.mark.parametrize("mode", [{"mode": "merged"}, {"swappable": "base"}], ids=["merged", "swappable"])
def test_new_tokens_are_the_adapters(encoder: tuple, tmp_path: Path, mode: dict) -> None:
    base, adapter, trained = encoder
    result = export_adapter(adapter, tmp_path / "out" / "model.onnx", ExportOptions(base_model=base, **mode))
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.model.parent)
    assert json.loads((result.model.parent / "config.json").read_text())["vocab_size"] == len(tokenizer)
    texts = tokenizer(["a dragon and a wyvern", "rain"], padding=True, return_tensors="np")
    feeds = {name: np.asarray(value) for name, value in texts.items()}
    assert feeds["input_ids"].max() >= len(tokenizer) - len(WORDS)
    with torch.no_grad():
        wanted = trained(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
    session = create_session(result.model)
    if mode.get("swappable"):
        # Without an adapter the head and the new rows, which the base lacks, are this adapter's.
        assert {"adapter", "base"} == {weight.default for weight in result.manifest.swappable.weights}
        from loratrf_deploy.formats.fit import fit

        feeds |= fit(read_adapter(adapter), result.manifest.swappable.weights, "adapted")
    (got,) = session.run(None, feeds)
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < 1e-5


def test_fewer_tokens_than_the_base_has(encoder: tuple, tmp_path: Path) -> None:
    base, _, _ = encoder
    model = resized(base, transformers.AutoModelForSequenceClassification, 31)
    config = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    adapter = tiny.save_adapter(model, tmp_path / "adapter", "lora", 1, 3, config)
    trained = resized(base, transformers.AutoModelForSequenceClassification, 31)
    trained = peft.PeftModel.from_pretrained(trained, adapter).eval()
    ours = load_reference(read_adapter(adapter), base)
    assert ours.model.config.vocab_size == 31
    ids = torch.tensor([[3, 30, 7]])
    with torch.no_grad():
        assert torch.equal(ours.model(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_tokens_that_nobody_brings(encoder: tuple, refused: Callable[..., str], tmp_path: Path) -> None:
    base, original, _ = encoder
    adapter = Path(shutil.copytree(original, tmp_path / "adapter"))
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    weights = adapter / "adapter_model.safetensors"
    edit_tensors(weights, lambda all: {key: value for key, value in all.items() if EMBEDDINGS not in key})
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base)
    assert f"has {rows + 3} tokens, but the base model {base} embeds {rows}" in message


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("grown-llm")
    base = tiny_llm.make_base(folder / "base", "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(WORDS)
    rows = json.loads((base / "config.json").read_text())["vocab_size"] + 3
    model = resized(base, transformers.AutoModelForCausalLM, rows)
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    adapter = tiny.save_adapter(model, folder / "adapter", "lora", 1, 3, config)
    tokenizer.save_pretrained(adapter)
    return base, adapter


def test_a_language_model_with_new_tokens(llm: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llm
    result = export_adapter(adapter, tmp_path / "out" / "model.onnx", ExportOptions(base_model=base))
    assert result.parity is not None
    grown = json.loads((base / "config.json").read_text())["vocab_size"] + 3
    assert json.loads((result.model.parent / "config.json").read_text())["vocab_size"] == grown


def test_rows_of_a_head_that_nobody_brings(llm: tuple[Path, Path], tmp_path: Path) -> None:
    base, original = llm
    adapter = Path(shutil.copytree(original, tmp_path / "adapter"))
    weights = adapter / "adapter_model.safetensors"
    edit_tensors(weights, lambda all: {key: value for key, value in all.items() if "lm_head" not in key})
    with pytest.raises(ValueError, match=r"but not those of lm_head\.weight: .*save_embedding_layers=True"):
        load_base(read_adapter(adapter), base)
