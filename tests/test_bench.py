"""loratrf-bench: what is timed, on which rows, and how figures come of times."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from loratrf_deploy import GenerationSession, UserError, create_session
from loratrf_deploy.bench import rounds
from loratrf_deploy.bench.deployments import Deployment, Setting, deployments
from loratrf_deploy.bench.rows import random_prompts, random_rows
from loratrf_deploy.cli.bench import main
from loratrf_deploy.export import ExportOptions
from loratrf_deploy.export.grouped import export_grouped
from loratrf_deploy.genai.folder import CONFIG_FILE
from loratrf_deploy.runtime.staged_session import StagedSession
from shared import edit_json, read_json

FAST = ["--batch", "1", "3", "--sequence", "5", "--rounds", "2", "--tokens", "3", "--threads", "1"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that `rounds` sees, in seconds."""
    now = [0.0]
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: now[0])
    return now


def test_figures_are_of_the_rounds_own_ratios(clock: list[float]) -> None:
    """A machine that slows down in the middle: the second is twice the first in every round all the same."""
    order: list[tuple[str, int]] = []

    def takes(name: str, seconds: float) -> Deployment:
        def call(rows: int) -> None:
            order.append((name, rows))
            clock[0] += seconds * (1 if rows < 4 else 10)

        return Deployment(name, lambda batch, sequence, rng: int(len(order) / 2), {"run": call})

    first, second = rounds.measure([takes("a", 0.001), takes("b", 0.002)], 4, 7, rounds=8, tokens=1)
    assert (first.deployment, first.part, first.batch, first.sequence, first.ratio) == ("a", "run", 4, 7, 1.0)
    assert second.ratio == pytest.approx(2.0)
    assert first.p50_ms == pytest.approx(10.0)  # 6 of 8 rounds were slow
    assert first.per_second == pytest.approx(4 / 0.01)
    pairs = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert len(pairs) == 8 + rounds.WARM_UP
    assert {tuple(name for name, _ in pair) for pair in pairs} == {("a", "b"), ("b", "a")}
    assert all(pair[0][1] == pair[1][1] for pair in pairs)


def test_a_token_is_what_more_of_them_take_longer(clock: list[float]) -> None:
    def makes(tokens: int):
        return lambda rows: clock.__setitem__(0, clock[0] + 0.5 + 0.01 * (tokens - 1))

    one = Deployment("a", lambda *which: 0, {"first": makes(1), "more": makes(5)})
    prompt, token = rounds.measure([one], 2, 100, rounds=3, tokens=4)
    assert (prompt.part, token.part) == ("prompt", "token")
    assert (prompt.p50_ms, token.p50_ms) == (pytest.approx(500), pytest.approx(10))
    assert (prompt.per_second, token.per_second) == (pytest.approx(400), pytest.approx(200))


@pytest.mark.parametrize("which", [("bert", "text-classification"), ("vit", "image-classification")])
def test_rows_are_what_the_graph_takes(make_export, which) -> None:
    model = make_export(*which, "lora", mode="separate").model
    session = create_session(model)
    rows = random_rows(model.parent, session.get_inputs(), 3, 9, np.random.default_rng(0))
    assert {name: len(value) for name, value in rows.items()} == {value.name: 3 for value in session.get_inputs()}
    assert np.isfinite(session.run(None, rows)[0]).all()
    if "input_ids" in rows:
        assert rows["input_ids"].shape == (3, 9)
        assert rows["attention_mask"].all()


def test_an_encoder_on_the_command_line(capsys, make_export, tmp_path: Path) -> None:
    swappable = make_export(kind="loratrf", swappable="base").model
    fixed = make_export(kind="loratrf", mode="separate").model
    picture = tmp_path / "bars.svg"
    capsys.readouterr()
    assert main(["--model", str(fixed), str(swappable.parent), *FAST, "--svg", str(picture), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    names = [fixed.parent.name, f"{swappable.parent.name}, base", f"{swappable.parent.name}, adapter loratrf"]
    assert [row["deployment"] for row in facts["figures"]] == names * 2
    assert {(row["batch"], row["sequence"], row["part"]) for row in facts["figures"]} == {(1, 5, "run"), (3, 5, "run")}
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in facts["figures"])
    assert [model["made"][:10] for model in facts["models"]] == ["separate, ", "swappable,"]
    assert all(model["peak_mb"] > 20 and model["megabytes"] > 0.05 for model in facts["models"])
    page = ElementTree.parse(picture).getroot()
    bars = [float(bar.get("width", 0)) for bar in page.findall("{*}rect")][1:]
    group = facts["figures"][:3]
    scale = (800 - 300) / max(row["p99_ms"] for row in group)
    assert bars[:3] == pytest.approx([scale * row["p50_ms"] for row in group], abs=0.06)
    assert len(bars) == 6

    assert main(["--model", str(fixed), *FAST, "--no-library"]) == 0
    shown = capsys.readouterr().out
    assert "1 x 5" in shown
    assert "separate, float32, opset 20, text-classification" in shown


def test_mixed_batches_have_an_adapter_a_row(make_tiny, make_export, tmp_path: Path) -> None:
    base, adapter = make_tiny(kind="lora")
    out = tmp_path / "model.onnx"
    export_grouped({"a": adapter, "b": adapter}, out, ExportOptions(base_model=base, check=False))
    ones = deployments("g", out, {}, Setting(threads=1))
    assert [one.name for one in ones] == ["g, base", "g, an adapter a row"]
    rows = ones[0].rows(3, 5, np.random.default_rng(0))
    plain, adapted = (one.calls["run"](rows)["logits"] for one in ones)
    fixed = create_session(make_export(kind="lora", mode="separate").model).run(None, rows)[0]
    np.testing.assert_allclose(adapted, fixed, rtol=1e-4, atol=1e-5)
    assert not np.allclose(plain, fixed, atol=1e-3)


def test_a_language_model(exported) -> None:
    """The parts make as many tokens as they say, whatever token would end a text."""
    model = exported("loratrf", swappable="base")
    base, adapted = deployments("m", model, {}, Setting(threads=1, tokens=4))
    rows = base.rows(2, 6, np.random.default_rng(1))
    assert [len(row) for row in rows] == [6, 6]
    first, more = (adapted.calls[part](rows) for part in ("first", "more"))
    assert [len(row) for row in first + more] == [1, 1, 5, 5]
    assert [row[:1] for row in more] == first
    assert base.calls["more"](rows) != more
    session = GenerationSession(model)
    session.load("own", next(model.parent.glob("*.onnx_adapter")))
    assert more == session.generate_tokens(rows, adapter="own", max_new_tokens=5, stop=False)


def test_nothing_stops_what_is_timed(exported, tmp_path: Path) -> None:
    model = exported("loratrf", swappable="base")
    (free,) = GenerationSession(model).generate_tokens([[5, 6, 7]], adapter=None, max_new_tokens=5, stop=False)
    copy = Path(shutil.copytree(model.parent, tmp_path / "copy"))
    config = read_json(copy / CONFIG_FILE)
    config["model"]["eos_token_id"] = free[1]
    (copy / CONFIG_FILE).write_text(json.dumps(config))
    session = GenerationSession(copy)
    which = {"adapter": None, "max_new_tokens": 5}
    assert session.generate_tokens([[5, 6, 7]], **which) == [free[:1]]
    (row,) = session.generate_tokens([[5, 6, 7]], **which, stop=False)
    assert (row[:1], len(row)) == (free[:1], 5)


@pytest.fixture
def in_stages(staged) -> Path:
    return staged().model


@pytest.mark.parametrize("which", [("gpt2", "lora"), ("whisper", "loratrf")])
def test_a_model_in_stages(which: tuple[str, str], capsys, staged) -> None:
    model = staged(*which).model
    capsys.readouterr()
    assert main(["--model", str(model), "--json", *FAST]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert [(row["batch"], row["part"]) for row in figures] == [
        (batch, part) for batch in (1, 3) for part in ("prompt", "token")
    ]


def test_threads_are_as_many_as_asked_for(in_stages: Path, exported) -> None:
    def threads(session: type, folder: Path, count: int) -> int:
        before = len(os.listdir("/proc/self/task"))
        opened = session(folder, threads=count)
        added = len(os.listdir("/proc/self/task")) - before
        del opened
        return added

    for session, folder in ((StagedSession, in_stages), (GenerationSession, exported("loratrf", swappable="base"))):
        threads(session, folder.parent, 1)  # what starts once in a process
        assert threads(session, folder.parent, 3) - threads(session, folder.parent, 1) == 2, session


def test_mistakes_are_paragraphs(capsys, make_export, exported, tmp_path: Path) -> None:
    fixed, llm = make_export(kind="loratrf", mode="separate").model, exported("loratrf", swappable="base")
    adapter = next(llm.parent.glob("*.onnx_adapter"))
    copy = Path(shutil.copytree(fixed.parent, tmp_path / "copy"))
    edit_json(copy / "config.json", vocab_size="many")
    for arguments, problem in [
        (["--model", tmp_path], "No model at"),
        (["--model", fixed, llm], "time each kind by itself"),
        (["--model", fixed, "--adapter", f"a={adapter}"], "takes no adapters at run time"),
        (["--model", fixed, "--sequence", "100000"], "has positions for"),
        (["--model", fixed, "--svg", tmp_path / "a.png"], "Expected one of: .svg"),
        (["--model", copy], "doesn't say what that is"),
        (["--model", fixed, "--rounds", "0"], "--rounds"),
    ]:
        capsys.readouterr()
        assert main([*map(str, arguments)]) == 2, problem
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1)
        assert problem in shown.err
    with pytest.raises(UserError, match="vocab_size None"):
        random_prompts({}, 1, 2, np.random.default_rng(0))
