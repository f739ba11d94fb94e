"""--evaluate: answers of an export beside PyTorch's and the labels, on a user's own rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from loratrf_deploy import UserError, create_session
from loratrf_deploy.cli.export import main as export_main
from loratrf_deploy.cli.parity import main as parity_main
from loratrf_deploy.export import ExportOptions, export_adapter, sparing
from loratrf_deploy.parity import check_parity
from loratrf_deploy.parity.result import EVALUATED
from shared import read_json
from tiny import SENTENCES

TEXTS = [
    *("a gripping film that never lets go", "rain fell on the old town hall", "what", "she wrote 3 letters , sent 2"),
    *(
        "where is the library ?",
        "the cast",
        "boats came home",
        "the plot is thin and the jokes are older",
        "it",
        "so !",
    ),
]


def answers(base: Path, adapter: Path, texts: Sequence[str] = TEXTS) -> list[int]:
    """PEFT's, text by text: nothing that batches or padding could hide."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]


def write(file: Path, labels: list[Any]) -> Path:
    rows = [
        {"text": text} | ({} if label is None else {"label": label}) for text, label in zip(TEXTS, labels, strict=True)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def found(report: Any) -> str:
    (check,) = [check for check in report.checks if check.variant == EVALUATED]
    assert check.status == "passed"
    return check.reason


def test_counts_against_peft_and_onnx_runtime_row_by_row(make_tiny: Callable, tmp_path: Path, capsys) -> None:
    base, adapter = make_tiny("bert")
    model = tmp_path / "out" / "model.onnx"
    right = answers(base, adapter)
    labels = [(answer + (row % 5 == 0)) % 3 for row, answer in enumerate(right)]  # two of ten are wrong
    file = write(tmp_path / "dev.jsonl", labels)
    arguments = ["--adapter", str(adapter), "--base-model", str(base), "--quantize", "int8"]
    capsys.readouterr()
    assert export_main([*arguments, "--evaluate", str(file), "--out", str(model)]) == 0

    tokenizer, session = transformers.AutoTokenizer.from_pretrained(base), create_session(model)
    names = {value.name for value in session.get_inputs()}
    got = []
    for text in TEXTS:
        feeds = {name: value for name, value in tokenizer(text, return_tensors="np").items() if name in names}
        got.append(int(session.run(["logits"], feeds)[0].argmax()))
    differ = sum(a != b for a, b in zip(got, right, strict=True))
    hits = sum(a == b for a, b in zip(got, labels, strict=True))
    said = f"{differ} of 10 answers of dev.jsonl differ from PyTorch's in float32; right are {hits / 10:.4f} of them, "
    assert said + "of PyTorch's 0.8000" in capsys.readouterr().out
    rows = read_json(model.with_name("loratrf.json"))["parity"]["checks"]
    assert said in next(row["reason"] for row in rows if row["variant"] == EVALUATED)


def test_an_export_that_answers_otherwise_is_counted(
    make_export: Callable, make_tiny: Callable, tmp_path: Path
) -> None:
    """The model of one adapter evaluated as if it were another's: the proof fails, and the count says how far."""
    exported = make_export("bert", "text-classification", "lora", mode="merged")
    base, other = make_tiny("bert", "text-classification", "lora", seed=11, lora_alpha=160)
    right = answers(base, other)
    differ = sum(a != b for a, b in zip(answers(base, exported.adapter), right, strict=True))
    assert differ > 0
    for labels in ([None] * 10, right):
        report = check_parity(exported.model, other, base, evaluate_on=write(tmp_path / "dev.jsonl", labels))
        assert not report.passed
        said = f"{differ} of 10 answers of dev.jsonl differ from PyTorch's in float32"
        if labels is right:
            said += f"; right are {1 - differ / 10:.4f} of them, of PyTorch's 1.0000"
        assert found(report) == said


def test_labels_may_be_names(make_export: Callable, tmp_path: Path) -> None:
    exported = make_export("bert")
    right = answers(exported.base, exported.adapter)
    file = write(tmp_path / "dev.jsonl", [f"LABEL_{answer}" for answer in right])
    assert "right are 1.0000 of them" in found(check_parity(exported.model, exported.adapter, evaluate_on=file))


def test_the_adapters_own_names_go_with_the_model(make_tiny: Callable, tmp_path: Path) -> None:
    base, adapter = make_tiny("bert", kind="lora")
    named = Path(shutil.copytree(adapter, tmp_path / "named"))
    (named / "config.json").write_text(json.dumps({"id2label": {"0": "ham", "1": "spam", "2": "eggs"}}))
    names = ["ham", "spam", "eggs"]
    file = write(tmp_path / "dev.jsonl", [names[answer] for answer in answers(base, adapter)])
    options = ExportOptions(base_model=base, mode="separate", evaluate=file)
    result = export_adapter(named, tmp_path / "out" / "model.onnx", options)
    assert "right are 1.0000 of them" in found(result.parity)
    config = transformers.AutoConfig.from_pretrained(result.model.parent)
    assert (config.id2label, config.label2id) == (dict(enumerate(names)), {"ham": 0, "spam": 1, "eggs": 2})
    assert config.architectures == ["BertForSequenceClassification"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([*[0] * 9, 3], r"dev\.jsonl, line 10: the label is 3, expected 0 to 2 or one of LABEL_0, LABEL_1, LABEL_2"),
        (["good", *[0] * 9], r"line 1: the label is 'good'"),
        ([True, *[0] * 9], r"line 1: the label is True"),
        ([0, None, *[1] * 8], r"9 labels for 10 rows \(line 2 has none\)"),
    ],
)
def test_labels_at_fault(labels: list, words: str, make_export: Callable, tmp_path: Path) -> None:
    exported = make_export("bert")
    with pytest.raises(UserError, match=words):
        check_parity(exported.model, exported.adapter, evaluate_on=write(tmp_path / "dev.jsonl", labels))


def test_models_without_answers(make_export: Callable, tmp_path: Path) -> None:
    exported = make_export("bert", "feature-extraction")
    with pytest.raises(UserError, match=r"--evaluate counts answers of models that classify.*feature-extraction"):
        check_parity(exported.model, exported.adapter, evaluate_on=write(tmp_path / "dev.jsonl", [None] * 10))


@pytest.mark.parametrize("more", [["--no-check"], ["--onto", "model.onnx"]])
def test_nothing_is_evaluated_without_a_proof(more: list[str], tmp_path: Path, capsys) -> None:
    arguments = ["--adapter", "a", "--evaluate", "dev.jsonl", "--out", str(tmp_path / "m.onnx"), *more]
    assert export_main(arguments) == 2
    assert "--evaluate is part of the proof" in capsys.readouterr().err


def test_a_file_that_is_not_there(make_export: Callable, tmp_path: Path, capsys) -> None:
    exported = make_export("bert")
    arguments = ["--adapter", str(exported.adapter), "--evaluate", str(tmp_path / "none.jsonl")]
    assert export_main([*arguments, "--out", str(tmp_path / "m.onnx")]) == 2
    assert parity_main([*arguments, "--model", str(exported.model)]) == 2
    said = capsys.readouterr().err
    assert said.count("o file to evaluate on at") == 2


def test_int8_keeps_layers_for_the_answers_that_may_change(make_tiny: Callable, tmp_path: Path, capsys) -> None:
    """Counted against PEFT text by text, on texts of which int8 throughout changes more."""
    base, adapter = make_tiny("bert", kind="lora")
    draw = np.random.default_rng(0)
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    texts = [" ".join(draw.choice(words, draw.integers(1, 9))) for _ in range(300)]
    file = tmp_path / "dev.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    right = answers(base, adapter, texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def changed(*more: str) -> tuple[int, dict]:
        model = tmp_path / str(len(list(tmp_path.iterdir()))) / "model.onnx"
        command = ["--adapter", adapter, "--base-model", base, "--quantize", "int8", "--evaluate", file, "--out", model]
        capsys.readouterr()
        assert export_main([*map(str, command), *more]) == 0
        session = create_session(model)
        names = {value.name for value in session.get_inputs()}
        got = []
        for text in texts:
            feeds = {name: value for name, value in tokenizer(text, return_tensors="np").items() if name in names}
            got.append(int(session.run(["logits"], feeds)[0].argmax()))
        return sum(a != b for a, b in zip(got, right, strict=True)), read_json(model.with_name("loratrf.json"))

    most, throughout = changed()
    assert most > 10
    assert throughout["keep_float"] == []
    few, spared = changed("--max-loss", "1.5")
    assert few <= 4  # 1.5 % of 300, down
    assert 0 < len(spared["keep_float"]) < 10
    assert f"int8 weights but for {len(spared['keep_float'])} layers" in capsys.readouterr().out
    swapped, kept = changed("--max-loss", "1.5", "--swappable", "adapter", "--keep-float", "*.layer.1.*")
    assert swapped <= 4
    assert {name for name in kept["keep_float"] if ".layer.1." in name} == {
        f"bert.encoder.layer.1.{name}"
        for name in (
            *(f"attention.self.{part}" for part in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        )
    }


LOSSES = {"small table": 4.0, "large table": 4.0, "worst": 9.0, "packed": 1.0, "nothing": 0.0}


class _Trial:
    """Layers of which each alone moves two logits apart, and answers to 20 rows change as the sum of them says."""

    def __init__(self, *which: object):
        self.runs = 0

    def units(self, patterns: object) -> list[tuple[list[str], int]]:
        return [([name], 10) if name != "large table" else ([name], 1000) for name in LOSSES if name != "packed"] + [
            (["packed", "with it"], 10)
        ]

    def logits(self, keep: Any, batches: Any) -> np.ndarray:
        loss = 0.0 if keep is None else sum(value for name, value in LOSSES.items() if name not in keep)
        rows = np.arange(20)[:, None] < loss  # as many rows change their answer
        return np.where(rows, [loss, 0.0], [0.0, 0.1])


@pytest.mark.parametrize(
    ("percent", "kept"),
    [
        (90, ("*.0",)),
        (89, ("*.0", "worst")),
        (44, ("*.0", "worst", "small table")),
        (24, ("*.0", "worst", "small table", "packed", "with it")),
        (0, ("*.0", "worst", "small table", "packed", "with it", "large table")),
    ],
)
def test_what_costs_most_for_its_size_stays(monkeypatch: pytest.MonkeyPatch, percent: float, kept: tuple) -> None:
    monkeypatch.setattr(sparing, "_Trial", _Trial)
    monkeypatch.setattr(sparing, "read_inputs", lambda *which: [{"input_ids": np.zeros((20, 1))}])
    options = ExportOptions(quantize="int8", keep_float=("*.0",), max_loss=percent, evaluate=Path("dev.jsonl"))
    base: Any = SimpleNamespace(task="text-classification")
    assert sparing.spared(None, None, base, Path(), options, {}) == kept  # type: ignore[arg-type]
    if percent == 0:
        monkeypatch.setitem(LOSSES, "nothing", 0.5)
        with pytest.raises(UserError, match=r"allows 0 of the 20 answers of dev\.jsonl .* no layer can be in int8"):
            sparing.spared(None, None, base, Path(), options, {})  # type: ignore[arg-type]


def test_a_proof_fails_where_more_answers_differ(make_export: Callable, make_tiny: Callable, tmp_path: Path) -> None:
    exported = make_export("bert", "text-classification", "lora", mode="merged")
    base, other = make_tiny("bert", "text-classification", "lora", seed=11, lora_alpha=160)
    differ = sum(a != b for a, b in zip(answers(base, other), answers(base, exported.adapter), strict=True))
    file = write(tmp_path / "dev.jsonl", [None] * 10)
    for percent, status in ((10 * differ, "passed"), (10 * differ - 1, "failed")):
        report = check_parity(exported.model, other, base, evaluate_on=file, max_loss=percent)
        (check,) = [check for check in report.checks if check.variant == EVALUATED]
        assert check.status == status
        assert ("more than --max-loss" in check.reason) == (status == "failed")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max-loss", "1"], "needs both --quantize int8 and rows"),
        (["--max-loss", "1", "--quantize", "int8"], "needs both --quantize int8 and rows"),
        (["--max-loss", "-1", "--quantize", "int8", "--evaluate", "FILE"], "--max-loss is -1, expected percent"),
        (["--max-loss", "nan", "--quantize", "int8", "--evaluate", "FILE"], "--max-loss is nan, expected percent"),
        (["--max-loss", "much"], "invalid float value: 'much'"),
    ],
)
def test_a_loss_at_fault(refused: Callable, make_tiny: Callable, tmp_path: Path, more: list[str], words: str) -> None:
    base, adapter = make_tiny("bert")
    file = write(tmp_path / "dev.jsonl", [0] * 10)
    arguments = [str(file) if word == "FILE" else word for word in more]
    assert words in refused(tmp_path / "m.onnx", "--adapter", adapter, "--base-model", base, *arguments)
