"""Adapters by their names on the hub, from its cache: every command that takes an adapter's folder takes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from loratrf_deploy import read_adapter
from loratrf_deploy.cli import export, inspect, parity, perplexity
from shared import edit_json, run_python

NAME = "someone/sst2-lora"


@pytest.fixture
def base(make_tiny: Callable[..., tuple[Path, Path]], hub: Callable[..., Path], tmp_path: Path) -> Path:
    """The base of two adapters that are in the cache alone: NAME has rank 4, its revision v2 rank 6."""
    for revision, rank in (("main", 4), ("v2", 6)):
        base, adapter = make_tiny(kind="lora", r=rank)
        hub(adapter, NAME, revision)
    return base


def test_a_revision_is_read(base: Path) -> None:
    assert {layer.rank for layer in read_adapter(NAME).layers.values()} == {4}
    assert {layer.rank for layer in read_adapter(f"{NAME}@v2").layers.values()} == {6}
    assert read_adapter(f"{NAME}@v2").name == "sst2-lora"


def test_every_command_takes_a_name(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "out" / "model.onnx"
    own = ["--base-model", str(base)]
    exported = ["--out", str(model), "--swappable", "base", "--no-check"]
    assert export.main(["--adapter", f"{NAME}@v2", *own, *exported]) == 0
    # It is called as on the hub, not as the folder of the cache.
    assert (tmp_path / "out" / "sst2-lora.onnx_adapter").is_file()
    assert json.loads((tmp_path / "out" / "loratrf.json").read_text())["adapter"]["name"] == "sst2-lora"
    assert export.main(["--adapter", NAME, *own, "--onto", str(model), "--out", str(tmp_path / "a.onnx_adapter")]) == 0
    assert parity.main(["--model", str(model), "--adapter", f"{NAME}@v2", *own]) == 0
    capsys.readouterr()
    assert inspect.main([f"{NAME}@v2", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["kind"] == "adapter"
    assert shown.err == ""
    (text := tmp_path / "text.txt").write_text("rain fell")
    assert perplexity.main(["--text", str(text), "--adapter", NAME, *own, "--model", str(model)]) == 2
    assert f"The adapter {NAME} is for text-classification" in capsys.readouterr().err


def test_several_names(base: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    message = refused(tmp_path / "model.onnx", "--adapters", f"a={NAME}", f"b={NAME}@v3", "--base-model", base)
    assert f"no adapter {NAME}@v3" in message  # and `a` was read


def test_a_name_that_nobody_has(base: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    message = refused(tmp_path / "model.onnx", "--adapter", "someone/else", "--base-model", base)
    for words in (str(Path("someone/else").resolve()), "HF_HUB_OFFLINE is set", str(tmp_path / "hub")):
        assert words in message


def test_a_folder_comes_before_a_name(base: Path, make_tiny, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(make_tiny(kind="lora", r=4)[1], tmp_path / f"{NAME}@v2")
    assert {layer.rank for layer in read_adapter(f"{NAME}@v2").layers.values()} == {4}
    assert read_adapter(f"{NAME}@v2").name == "sst2-lora@v2"


def test_a_pickle_alone(base: Path, hub: Callable, make_tiny, tmp_path: Path, refused: Callable[..., str]) -> None:
    adapter = Path(shutil.copytree(make_tiny(kind="lora", r=4)[1], tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    hub(adapter, "someone/old")
    message = refused(tmp_path / "model.onnx", "--adapter", "someone/old", "--base-model", base)
    assert "is a pickle file" in message


def test_a_config_that_leads_out_of_the_cache(base: Path, hub: Callable, make_tiny, tmp_path: Path, refused) -> None:
    adapter = Path(shutil.copytree(make_tiny(kind="lora", r=4)[1], tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", r=4)
    folder = hub(adapter, "someone/links")
    (secret := tmp_path / "secret.json").write_text((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(secret)
    assert "outside of its folder" in refused(
        tmp_path / "model.onnx", "--adapter", "someone/links", "--base-model", base
    )


def test_without_huggingface_hub(tmp_path: Path) -> None:
    code = "import sys; from loratrf_deploy import read_adapter; read_adapter('someone/adapter')"
    assert "pip install huggingface_hub" in run_python(code, without=("huggingface_hub",)).stderr
