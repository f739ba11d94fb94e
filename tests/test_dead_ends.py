"""Errors whose advice leads somewhere: what can be exported in no mode is not sent from one mode to the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file

from loratrf_deploy.cli.export import main
from shared import edit_json

Refused = Callable[..., str]
MODES = ([], ["--mode", "separate"], ["--swappable", "base"])


def adapter_of(folder: Path, **config: object) -> Path:
    """A folder with this config and one tensor."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": np.ones((2, 4), np.float32)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_prompts_fold_into_nothing_whatever_the_mode(refused: Refused, make_tiny, tmp_path: Path, kind: str) -> None:
    adapter = adapter_of(tmp_path / "adapter", peft_type=kind, task_type="SEQ_CLS", num_virtual_tokens=2)
    for mode in MODES:
        message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", make_tiny()[0], *mode)
        assert f"can't be exported: peft_type {kind}" in message
        assert "--mode" not in message
        assert "Train LoRA" in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"task_type": "SEQ_CLS"}, "only causal language models, not SEQ_CLS"),
        ({"task_type": "CAUSAL_LM", "use_dora": True}, "has use_dora=True"),
        ({"task_type": "CAUSAL_LM", "init_lora_weights": "pissa"}, "has init_lora_weights"),
    ],
    ids=["an encoder's", "DoRA", "PiSSA"],
)
def test_an_alora_that_no_mode_can_run(refused: Refused, make_tiny, tmp_path, config: dict, words: str) -> None:
    base, original = make_tiny(kind="lora", use_dora="use_dora" in config)
    adapter = Path(shutil.copytree(original, tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", alora_invocation_tokens=[1, 2], **config)
    for mode in MODES:
        message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base, *mode)
        assert words in message
        assert "--" not in message


def test_ranks_of_what_never_merges(refused: Refused, make_tiny, tmp_path: Path) -> None:
    base, filters = make_tiny(filter_rank=1025, target_modules=["query"])
    for mode in MODES:
        message = refused(tmp_path / "out" / "model.onnx", "--adapter", filters, "--base-model", base, *mode)
        assert "ranks over 1024" in message
        assert "ranks of at most 1024" in message
        assert "--mode" not in message


def test_a_rank_that_is_too_high_to_swap_is_merged(refused: Refused, make_tiny, tmp_path: Path) -> None:
    base, adapter = make_tiny(kind="lora", r=1025, target_modules=["query"])
    command = ["--adapter", adapter, "--base-model", base]
    message = refused(tmp_path / "out" / "model.onnx", *command, "--swappable", "base")
    assert "--mode merged, not swappable" in message


@pytest.mark.parametrize("trained_on", ["BertForNextSentencePrediction", None])
def test_task_type_is_advised_only_where_it_helps(refused: Refused, make_tiny, tmp_path: Path, trained_on) -> None:
    base, original = make_tiny("bert", "token-classification", "lora")
    base = Path(shutil.copytree(base, tmp_path / "base"))
    adapter = Path(shutil.copytree(original, tmp_path / "adapter"))
    edit_json(base / "config.json", architectures=["BertForNextSentencePrediction"])
    mapping = {"base_model_class": trained_on, "parent_library": "transformers"} if trained_on else None
    edit_json(adapter / "adapter_config.json", task_type=None, auto_mapping=mapping)
    command = ["--adapter", str(adapter), "--base-model", str(base), "--no-check"]
    message = refused(tmp_path / "out" / "model.onnx", *command)
    assert "BertForNextSentencePrediction" in message
    if trained_on:
        assert "doesn't help" in message
        return
    assert "set that as task_type" in message
    edit_json(adapter / "adapter_config.json", task_type="TOKEN_CLS")
    assert main([*command, "--out", str(tmp_path / "out" / "model.onnx")]) == 0


def test_a_model_of_which_transformers_has_no_class_for_the_task(refused: Refused, make_tiny, tmp_path: Path) -> None:
    """transformers' own words are the names of all the classes that it has."""
    transformers.CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path / "base")
    adapter = Path(shutil.copytree(make_tiny(kind="lora")[1], tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", task_type="CAUSAL_LM")
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", tmp_path / "base")
    assert "type clip (CLIPModel)" in message
    assert "no model for text-generation" in message
    assert len(message) < 600


def test_a_file_in_the_place_of_a_folder(refused: Refused, make_tiny, tmp_path: Path) -> None:
    base, adapter = make_tiny()
    (archive := tmp_path / "adapter.zip").write_bytes(b"PK")
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", archive, "--base-model", base)
    assert "Unpack it" in message
    assert f"Pass {tmp_path}" not in message
    weights = adapter / "adapter_model.safetensors"
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", weights, "--base-model", base)
    assert f"Pass {adapter}." in message


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_failed_proof_is_no_reason_to_skip_it(capsys, make_tiny, tmp_path: Path, monkeypatch, dtype: str) -> None:
    from loratrf_deploy import parity

    monkeypatch.setitem(parity.TOLERANCES, dtype, 1e-12)
    base, adapter = make_tiny()
    out = tmp_path / "out" / "model.onnx"
    capsys.readouterr()
    assert main(["--adapter", str(adapter), "--base-model", str(base), "--out", str(out), "--dtype", dtype]) == 1
    error = capsys.readouterr().err
    assert "--no-check" not in error
    assert ("--dtype float32" in error) == (dtype == "float16")


def test_a_failure_that_says_nothing(refused: Refused, make_tiny, tmp_path: Path, monkeypatch) -> None:
    """An assertion of torch's, without a word."""
    from transformers.exporters.exporter_onnx import OnnxExporter

    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(OnnxExporter, "export", fail)
    base, adapter = make_tiny()
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base)
    assert "can't be traced to ONNX: AssertionError. It may need" in message
