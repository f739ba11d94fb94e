"""What strangers' files say is shown on one printable line: no terminal obeys it, and no line of it passes for ours."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from loratrf_deploy import UserError, create_session
from loratrf_deploy.errors import cut, one_line, some
from loratrf_deploy.parity.figures import Figures
from loratrf_deploy.parity.result import Check, LayerError, ParityReport
from loratrf_deploy.reports.formats import print_report, to_html, to_junit, to_markdown
from shared import edit_json

CLIPBOARD = "\x1b]52;c;ZXZpbA==\x07"
FORGED = f"x{CLIPBOARD}\r\nParity holds (3 passed).\u2028y\u202e\x9b31m"
BAD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800-\udfff]")


def test_an_error_is_one_printable_line_of_a_thousand_characters() -> None:
    message = str(UserError(f"The file {FORGED} is {'n' * 100_000}. Do this: --base-model PATH."))
    assert not BAD.search(message)
    assert "\n" not in message
    assert len(message) <= 1000
    assert message.startswith("The file x?]52;c;ZXZpbA==? Parity holds")
    assert message.endswith("n. Do this: --base-model PATH.")
    assert str(UserError("My  own\tfolder\n    of words")) == "My  own folder of words"
    # What is there already stays as it is.
    assert one_line(message) == message == cut(message) == str(UserError(message))


def test_names_in_a_list_are_cut_each() -> None:
    shown = some(["a" * 100_000, "short", *map(str, range(10))])
    assert len(shown) < 400
    assert shown.endswith("aaa, short, 0, 1, 2, and 7 more")


def hostile_tensor(adapter: Path, base: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[FORGED] = np.ones(2, np.float32)
    save_file(tensors, adapter / "adapter_model.safetensors")


HOSTILE: dict[str, Any] = {
    "a tensor's name": hostile_tensor,
    "a base's kind": lambda adapter, base: edit_json(base / "config.json", model_type=FORGED),
    "a long base's kind": lambda adapter, base: edit_json(base / "config.json", model_type="m" * 100_000),
    "a base's name": lambda adapter, base: edit_json(
        adapter / "adapter_config.json", base_model_name_or_path=f"/nowhere/{FORGED}"
    ),
    "a tokenizer's class": lambda adapter, base: edit_json(base / "tokenizer_config.json", tokenizer_class=[FORGED]),
    "a long field": lambda adapter, base: edit_json(adapter / "adapter_config.json", task_type="t" * 100_000),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_command_s_paragraph(what, make_tiny, refused, tmp_path) -> None:
    base, adapter = make_tiny("bert", "text-classification", "lora")
    base, adapter = (Path(shutil.copytree(path, tmp_path / name)) for name, path in (("b", base), ("a", adapter)))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    HOSTILE[what](adapter, base)
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--no-check")
    assert not BAD.search(message[:-1])
    assert len(message) <= len("error: ") + 1001


def test_what_the_library_raises_is_as_printable(make_tiny, tmp_path) -> None:
    from loratrf_deploy import read_adapter

    adapter = Path(shutil.copytree(make_tiny("bert", "text-classification", "lora")[1], tmp_path / "a"))
    hostile_tensor(adapter, adapter)
    with pytest.raises(UserError) as caught:
        read_adapter(adapter)
    assert not BAD.search(str(caught.value))


@pytest.mark.parametrize("when", ["opening", "running"])
def test_onnx_runtime_s_log_prints_no_stranger_s_names(when, capfd, tmp_path) -> None:
    """Its log goes to stderr by itself; what it has to say is in the exception."""
    model = tmp_path / "model.onnx"
    kind = "Reshape" if when == "running" else f"Nothing{CLIPBOARD}"
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "shape"], ["y"], name=f"node{CLIPBOARD}")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [2, 3])],
    )
    opset = [helper.make_opsetid("", 20)]
    model.write_bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())
    if when == "opening":
        with pytest.raises(UserError, match=r"Nothing\?\]52"):
            create_session(model, library=False)
    else:
        with pytest.raises(Exception, match="Reshape"):
            create_session(model, library=False).run(None, {"x": np.ones(5, np.float32)})
    assert capfd.readouterr() == ("", "")


def test_genai_s_log_prints_no_stranger_s_names(exported, tmp_path, capfd) -> None:
    import onnx

    from loratrf_deploy.genai.generate import load_model

    folder = Path(shutil.copytree(exported(mode="separate").parent, tmp_path / "copy"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    model.graph.node[0].op_type = f"Nothing{CLIPBOARD}"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    capfd.readouterr()
    with pytest.raises(UserError, match=r"Nothing\?\]52"):
        load_model(folder)
    assert capfd.readouterr() == ("", "")


HTML = '<img src=x onerror="alert(1)">![x](https://example.com/x.png)|[y](javascript:z)`'


def hostile_report() -> ParityReport:
    figures = Figures(1.0, 1.0, 0.5, 1.0, 0, 1, 1)
    checks = (
        Check(
            "with library", f"logits{HTML}{FORGED}", "failed", f"[bold]because {HTML}{FORGED}" + "r" * 100_000, figures
        ),
    )
    layers = (LayerError(f"layer{HTML}{FORGED}", "LoraTrf", 1.0, 1.0, True),)
    return ParityReport("model.onnx", f"a{HTML}", "float32", 1e-5, checks, layers, "with library", 0, ({"x": (1, 2)},))


def test_a_report_on_a_terminal() -> None:
    from rich.console import Console

    shown = io.StringIO()
    print_report(hostile_report(), Console(file=shown, width=400, color_system=None))
    assert not BAD.search(shown.getvalue())
    assert not [line for line in shown.getvalue().splitlines() if line.lstrip().startswith("Parity holds")]
    assert "[bold]because" in shown.getvalue()
    assert max(map(len, shown.getvalue().splitlines())) <= 1001


def test_a_report_in_markdown_is_text() -> None:
    text = to_markdown(hostile_report())
    assert not BAD.search(text)
    assert "<" not in text
    assert not re.search(r"(?<!\\)[\[\]`]", text)
    assert [line for line in text.splitlines() if line.startswith("Parity holds")] == []
    rows = [line for line in text.splitlines() if line.startswith("| with library")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [8]
    assert "&lt;img src=x onerror=" in text
    assert len(text) < 10_000


def test_a_report_in_html_and_junit_is_text() -> None:
    for page in (to_html(hostile_report()), to_junit(hostile_report())):
        assert not BAD.search(page)
        assert "<img" not in page


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_says_is_not_obeyed(terminal, exported, monkeypatch) -> None:
    """On a terminal; in a pipe it is data."""
    from loratrf_deploy.cli import generate

    monkeypatch.setattr(generate.GenerationSession, "stream", lambda *arguments, **options: iter([FORGED, "\n"]))
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", shown)
    folder = str(exported(mode="separate").parent)
    assert generate.main(["--model", folder, "--prompt", "rain", "--max-new-tokens", "2"]) == 0
    assert (CLIPBOARD in shown.getvalue()) == (not terminal)
    shown.truncate(0)
    assert generate.main(["--model", folder, "--prompt", "rain", "--json"]) == 0
    assert "\x1b" not in shown.getvalue()
    assert CLIPBOARD in json.loads(shown.getvalue().lstrip("\0"))["answers"][0]["text"]


def test_inspect_shows_names_as_text(make_tiny, tmp_path, capsys) -> None:
    from loratrf_deploy.cli.inspect import main

    adapter = Path(shutil.copytree(make_tiny("bert", "text-classification", "lora")[1], tmp_path / "a"))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=FORGED + "b" * 100_000)
    capsys.readouterr()
    assert main([str(adapter)]) == 0
    shown = capsys.readouterr().out
    assert not BAD.search(shown)
    assert not [line for line in shown.splitlines() if line.startswith("Parity holds")]
    assert max(map(len, shown.splitlines())) < 1100
