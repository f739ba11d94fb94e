"""Bases that can't be had as they are: moved, pickled, in few bits; and what of a hub's cache is read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loratrf_deploy import read_adapter
from loratrf_deploy.pytorch.base import load_base
from shared import edit_json, edit_tensors

Refused = Callable[..., str]
HEAD = "classifier.weight"


@pytest.fixture
def own(make_tiny: Callable[..., tuple[Path, Path]], tmp_path: Path) -> tuple[Path, Path]:
    """(base, adapter) of a test's own."""
    base, adapter = make_tiny(kind="lora")
    return Path(shutil.copytree(base, tmp_path / "base")), Path(shutil.copytree(adapter, tmp_path / "adapter"))


def test_a_base_that_moved(refused: Refused, own: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = own
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/home/trainer/runs/base")
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter)
    assert "no folder /home/trainer/runs/base on this machine" in message
    assert "the adapter's base_model_name_or_path" in message
    assert "--base-model PATH" in message


def test_a_base_that_no_cache_has(refused: Refused, own: tuple[Path, Path], hub: Callable, tmp_path: Path) -> None:
    _, adapter = own
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/bert", revision="v2")
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter)
    for words in ("someone/bert (revision v2)", str(Path("someone/bert").resolve()), f"cache ({tmp_path / 'hub'})"):
        assert words in message


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b"),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "unsloth/Llama-3.2-1B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("TheBloke/Mistral-7B-v0.1-AWQ", "OWNER/Mistral-7B-v0.1"),
        ("someone/model-8bit-128g", "someone/model"),
    ],
)
def test_names_of_few_bits(
    refused: Refused, own: tuple[Path, Path], hub: Callable, tmp_path: Path, name: str, original: str
) -> None:
    _, adapter = own
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=name)
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter)
    assert f"--base-model {original} (a guess from the name)." in message


def test_a_base_in_few_bits_and_its_original(
    refused: Refused, own: tuple[Path, Path], hub: Callable, tmp_path: Path
) -> None:
    base, adapter = own
    hub(base, "someone/tiny-bert")
    edit_json(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    hub(base, "someone/tiny-bert-bnb-4bit")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/tiny-bert-bnb-4bit")
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter)
    assert "quantization_config: bitsandbytes" in message
    original = re.findall(r"--base-model (\S+) \(a guess", message)
    assert load_base(read_adapter(adapter), *original).path == "someone/tiny-bert"
    # A folder's name tells nobody what it was made from.
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base)
    assert message.endswith("Pass the original: --base-model PATH.\n")


def pickled(base: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """Puts pickled weights in the place of those of `base`."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    for shard in range(shards):
        part = {name: value for number, (name, value) in enumerate(tensors.items()) if number % shards == shard}
        torch.save(part, base / f"pytorch_model-{shard}.bin")
    return tensors


def test_the_command_that_converts_pickles(refused: Refused, own: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = own
    tensors = pickled(base, shards=2)
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base)
    command = re.search(r"in that folder: python -c \"(.*)\"", message)
    assert command
    subprocess.run([sys.executable, "-c", command[1]], cwd=base, check=True)
    loaded = load_base(read_adapter(adapter), base).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_pickles_on_the_hub(refused: Refused, own: tuple[Path, Path], hub: Callable, tmp_path: Path) -> None:
    base, adapter = own
    pickled(base)
    (base / "pytorch_model-0.bin").rename(base / "pytorch_model.bin")
    hub(base, "someone/old-bert")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/old-bert")
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter)
    assert "hf download someone/old-bert --local-dir FOLDER" in message
    assert "weights_only=True" in message
    assert "[...]" not in message  # what would be too long is cut


def test_the_revision_that_an_adapter_was_trained_on(own: tuple[Path, Path], hub: Callable) -> None:
    base, adapter = own
    hub(base, "someone/bert")
    changed = load_file(base / "model.safetensors")[HEAD].numpy() * 2
    edit_tensors(base / "model.safetensors", lambda tensors: tensors | {HEAD: changed})
    hub(base, "someone/bert", "v2")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="someone/bert", revision="v2")
    loaded = load_base(read_adapter(adapter))
    assert (loaded.path, loaded.revision) == ("someone/bert", "v2")
    assert np.array_equal(loaded.model.state_dict()[HEAD].numpy(), changed)
    edit_json(adapter / "adapter_config.json", revision=None)
    assert np.array_equal(load_base(read_adapter(adapter)).model.state_dict()[HEAD].numpy() * 2, changed)
