"""Nothing of a stranger's runs: Python that an adapter, its base or its tokenizer brings."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratrf_deploy.cli.export import main
from loratrf_deploy.errors import UserError
from shared import edit_json, read_json

RAN = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\n"
TOKENIZER = "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
MODEL = """from transformers import BertConfig, BertForSequenceClassification
class OwnConfig(BertConfig):
    model_type = "own-bert"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """The file that a stranger's Python writes when it runs. Whoever asks on stdin whether it may is told yes."""
    import transformers.dynamic_module_utils

    modules = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", list(sys.path))  # the cache of modules is put in
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    yield tmp_path / "marker"
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def with_own_tokenizer(folder: Path, base: Path, marker: Path) -> None:
    (folder / "tokenization_own.py").write_text(RAN.format(marker=str(marker)) + TOKENIZER)
    if folder != base:
        shutil.copy(base / "tokenizer.json", folder)
    config = read_json(base / "tokenizer_config.json") | {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def with_own_model(base: Path, marker: Path, **more: str) -> None:
    (base / "modeling_own.py").write_text(RAN.format(marker=str(marker)) + MODEL)
    names = {"AutoConfig": "OwnConfig", "AutoModelForSequenceClassification": "OwnModel", **more}
    auto_map = {auto: f"modeling_own.{own}" for auto, own in names.items()}
    edit_json(base / "config.json", model_type="own-bert", auto_map=auto_map)


@pytest.fixture
def own(make_tiny, tmp_path, marker):
    """own(what) -> an adapter and its base, copies to which `what`, adapter or base, brings Python of its own."""

    def make(what: str) -> tuple[Path, Path]:
        base, adapter = make_tiny("bert", "text-classification", "lora")
        base, adapter = (Path(shutil.copytree(path, tmp_path / name)) for name, path in (("b", base), ("a", adapter)))
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
        if what == "adapter's tokenizer":
            with_own_tokenizer(adapter, base, marker)
        else:
            with_own_model(base, marker)
        return adapter, base

    return make


@pytest.mark.parametrize("what", ["adapter's tokenizer", "base"])
def test_own_python_is_refused_and_with_the_flag_it_runs(what, own, refused, marker, tmp_path, capsys) -> None:
    adapter, base = own(what)
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter)
    assert f"The {'base model' if what == 'base' else 'tokenizer in'} {base if what == 'base' else adapter}" in message
    assert "--trust-remote-code" in message
    assert not marker.exists()
    out = tmp_path / "out" / "model.onnx"
    code = main(["--adapter", str(adapter), "--out", str(out), "--trust-remote-code"])
    assert code == 0, capsys.readouterr()
    assert "Parity holds" in capsys.readouterr().out
    assert marker.read_text() == "ran"
    assert (out.parent / "tokenizer.json").is_file()


def test_parity_refuses_it_too(own, marker, make_export) -> None:
    from loratrf_deploy import check_parity

    adapter, _ = own("base")
    model = make_export("bert", "text-classification", "lora").model
    with pytest.raises(UserError, match="--trust-remote-code"):
        check_parity(model, adapter)
    assert not marker.exists()


def test_a_model_that_an_adapter_names_beside_its_base(make_tiny, make_llm, refused, marker, tmp_path) -> None:
    """PEFT loads a SHADOW adapter's second model by itself, and asks on stdin whether its Python may run."""
    second = Path(shutil.copytree(make_tiny("bert", "text-classification", "lora")[0], tmp_path / "second"))
    with_own_model(second, marker, AutoModel="OwnModel")
    (adapter := tmp_path / "adapter").mkdir()
    config = {"peft_type": "SHADOW", "task_type": "CAUSAL_LM", "shadow_model": str(second)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.x": np.ones(2, np.float32)}, adapter / "adapter_model.safetensors")
    base, _ = make_llm("llama", "lora")
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base)
    assert not marker.exists()
    assert "can't be exported: peft_type SHADOW" in message


def test_whoever_loads_is_told_that_nothing_is_trusted(make_llm, tmp_path, monkeypatch) -> None:
    """transformers asks where nobody said; so does GenAI's builder, which loads the checkpoint again."""
    import transformers

    from loratrf_deploy.export import ExportOptions, export_adapter

    told: list[tuple[str, Any]] = []

    def telling(cls: Any) -> Any:
        real = cls.from_pretrained.__func__

        def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
            told.append((cls.__name__, options.get("trust_remote_code")))
            return real(cls, *arguments, **options)

        return classmethod(from_pretrained)

    base, adapter = make_llm("llama", "lora")
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        cls = getattr(transformers, name)
        monkeypatch.setattr(cls, "from_pretrained", telling(cls))
    export_adapter(adapter, tmp_path / "model.onnx", ExportOptions(base_model=base, check=False))
    assert {name for name, _ in told} == {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}
    assert [entry for entry in told if entry[1] is not False] == []


def test_a_question_that_nobody_sees_is_not_answered() -> None:
    from loratrf_deploy.pytorch.quiet import quiet

    with quiet(), pytest.raises(EOFError):
        input("May I?")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "can't be loaded"),
        (lambda folder: edit_json(folder / "tokenizer_config.json", init_inputs=["/etc/passwd"]), "init_inputs"),
        (
            lambda folder: edit_json(folder / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.json"]),
            "names files that are not in the folder",
        ),
        (lambda folder: edit_json(folder / "tokenizer_config.json", model_input_names=[["input_ids"]]), "input_names"),
    ],
)
def test_a_tokenizer_that_is_there_is_not_left_out(damage, words, make_tiny, refused, tmp_path) -> None:
    base, adapter = make_tiny("bert", "text-classification", "lora")
    own = Path(shutil.copytree(adapter, tmp_path / "own"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, own)
    damage(own)
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", own, "--base-model", base, "--no-check")
    assert f"The tokenizer in {own} can't be loaded: " in message
    assert words in message


def test_a_folder_without_a_tokenizer_has_none(make_tiny, tmp_path) -> None:
    from loratrf_deploy.pytorch.base import load_tokenizer

    base, _ = make_tiny("bert", "text-classification", "lora")
    folder = Path(shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*")))
    assert load_tokenizer(folder) is None
    assert load_tokenizer("nobody/no-such-model") is None
