"""--evaluate: answers of an export beside PyTorch's and the labels, on a user's own rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from loratrf_deploy import UserError, create_session
from loratrf_deploy.cli.export import main as export_main
from loratrf_deploy.cli.parity import main as parity_main
from loratrf_deploy.parity import check_parity
from loratrf_deploy.parity.result import EVALUATED
from shared import read_json

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


def answers(base: Path, adapter: Path) -> list[int]:
    """PEFT's, text by text: nothing that batches or padding could hide."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in TEXTS]


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
