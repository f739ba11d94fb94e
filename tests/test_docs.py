"""The site builds without a warning, its tables are what the code has, and its examples run."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

import loratrf_deploy
import loratrf_deploy.peft
from loratrf_deploy import export as exporting
from loratrf_deploy.formats.adapter_file import Origin, read_adapter_file
from loratrf_deploy.ops.schemas import FUNCTIONS, MAX_CUDA_RANK, MAX_RANK

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"


def table(page: str, first: str) -> list[list[str]]:
    """The rows of the page's tables whose first column is called `first`."""
    blocks = re.findall(rf"(?m)^\| {first} \|.*\n\|[ -|]*\n((?:\|.*\n)+)", (DOCS / page).read_text())
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for block in blocks for line in block.splitlines()
    ]


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "api.html").read_text()
    names = {f"loratrf_deploy.{name}" for name in loratrf_deploy.__all__ if name != "__version__"}
    names |= {f"loratrf_deploy.export.{name}" for name in exporting.__all__}
    missing = {name for name in names if f'id="{name}"' not in page}
    assert missing == {"loratrf_deploy.ExportOptions", "loratrf_deploy.export_adapter"}  # by their own module's name


def test_the_operators_are_those_of_the_schemas() -> None:
    rows = {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in table("operators.md", "operator")}
    assert rows == {name: list(schema.inputs) for name, schema in FUNCTIONS.items()}
    assert f"R and F go to {MAX_RANK}, on CUDA to {MAX_CUDA_RANK}." in (DOCS / "operators.md").read_text()


def test_an_adapter_file_is_what_the_page_says(make_export: Callable) -> None:
    path = make_export(swappable="base").model.with_name("loratrf.onnx_adapter")
    (snippet,) = snippets("formats.md")
    known: dict = {"path": path}
    exec(snippet, known)
    assert {row[0].strip("`") for row in table("formats.md", "field")} == {field.name for field in fields(Origin)}
    origin = read_adapter_file(path).origin
    assert known["origin"]["model_sha256"] == origin.model_sha256
    assert known["origin"]["adapter"]["name"] == origin.adapter.name


def test_the_export_that_is_shown_runs(
    make_tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    base, adapter = make_tiny(kind="lora")
    (tmp_path / "path" / "to").mkdir(parents=True)
    shutil.copytree(base, tmp_path / "path" / "to" / "base")
    shutil.copytree(adapter, tmp_path / "path" / "to" / "adapter")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    (snippet,) = snippets("api.md")
    exec(snippet, {})
    said = capsys.readouterr().out
    assert "separate, float32, opset 20, text-classification" in said
    assert "without library logits" in said
    shutil.rmtree(tmp_path / "path" / "to" / "adapter")
    with pytest.raises(SystemExit, match="No folder at path/to/adapter"):
        exec(snippet, {})


def marked() -> dict[tuple[str, str], list[str]]:
    """(consumer, what) -> the tests that are marked to prove it."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.consumer":
                    consumer, *whats = (ast.literal_eval(argument) for argument in mark.args)
                    for what in whats:
                        found.setdefault((consumer, what), []).append(f"{path.name}::{node.name}")  # type: ignore[attr-defined]
    return found


def test_where_it_runs_is_what_tests_are_marked_with() -> None:
    head = re.search(r"(?m)^\| consumer \|(.*)\|$", (DOCS / "consumers.md").read_text())
    assert head is not None
    columns = [cell.strip() for cell in head[1].split("|")]
    rows = {row[0]: dict(zip(columns, row[1:], strict=True)) for row in table("consumers.md", "consumer")}
    assert {cell for row in rows.values() for cell in row.values()} <= {"yes", "when asked", "no"}
    proven = {(consumer, what) for consumer, row in rows.items() for what, cell in row.items() if cell != "no"}
    assert proven == set(marked())
