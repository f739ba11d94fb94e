"""AdapterSession on a grouped model: an adapter per row, slots that come and go, threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from loratrf_deploy import AdapterSession, UserError, create_session
from loratrf_deploy.export import ExportOptions, export_grouped
from loratrf_deploy.export.onto import convert_adapter
from loratrf_deploy.formats.adapter_file import read_adapter_file
from shared import ask_while

ROWS = 12
IDS = {
    "input_ids": np.random.default_rng(0).integers(5, 60, (ROWS, 7)),
    "attention_mask": np.ones((ROWS, 7), np.int64),
    "token_type_ids": np.zeros((ROWS, 7), np.int64),
}


class Team(NamedTuple):
    """A grouped model, adapter files for it by name, and what each gives on IDS from a model of its own."""

    model: Path
    files: dict[str, Path]
    expected: dict[str | None, np.ndarray]


@pytest.fixture(scope="module")
def team(make_export: Callable, tmp_path_factory: pytest.TempPathFactory) -> Team:
    options = {
        "first": {},
        "lora": {"kind": "lora", "r": 2, "seed": 4, "lora_alpha": 9},
        # Of a higher rank than any slot of the export has.
        "later": {"r": 11, "filter_rank": 6, "seed": 8},
    }
    own = {name: make_export(mode="merged", **fields) for name, fields in options.items()}
    model = tmp_path_factory.mktemp("team") / "model.onnx"
    exported = {name: own[name].adapter for name in ("first", "lora")}
    export_grouped(exported, model, ExportOptions(base_model=own["first"].base, check=False))
    files = {name: model.with_name(f"{name}.onnx_adapter") for name in own}
    assert files["first"].is_file()
    assert files["lora"].is_file()
    convert_adapter(own["later"].adapter, model, files["later"])
    own[None] = make_export(swappable="base")
    return Team(model, files, {name: create_session(made.model).run(None, IDS)[0] for name, made in own.items()})


def assert_rows(session: AdapterSession, team: Team, names: list[str | None], known: dict | None = None) -> None:
    wanted = np.stack([team.expected[(known or {}).get(name, name)][row] for row, name in enumerate(names)])
    got = session.run(IDS, adapters=names)["logits"]
    np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.consumer("onnxruntime, Python", "by row")
@pytest.mark.consumer("onnxruntime with our library", "by row")
def test_every_row_is_its_own_adapters(team: Team, library: bool, capfd: pytest.CaptureFixture) -> None:
    session = AdapterSession(team.model, library=library)
    assert session.default == "base"
    assert_rows(session, team, [None] * ROWS)
    for name in ("first", "lora"):
        session.load(name, team.files[name])
    assert_rows(session, team, ["first", "lora", None] * 4)
    session.load("later", team.files["later"])
    names = [*team.expected]
    gaps = [np.abs(team.expected[a] - team.expected[b]).max() for a in names for b in names if a != b]
    assert min(gaps) > 1e-2
    assert_rows(session, team, [None, "later", "first", "lora"] * 3)
    assert_rows(session, team, ["later"] * 7 + ["lora"] * 5)
    np.testing.assert_allclose(session.run(IDS, adapter="lora")["logits"], team.expected["lora"], atol=2e-6)
    assert capfd.readouterr() == ("", "")


def test_slots_are_used_again_and_grow(team: Team) -> None:
    session = AdapterSession(team.model)
    for number in range(20):  # more than there are at first
        session.load(str(number), team.files[("first", "lora")[number % 2]])
    known = {str(number): ("first", "lora")[number % 2] for number in range(20)}
    assert_rows(session, team, [str(number) for number in range(ROWS)], known)
    count = session._way._bank._count
    for turn in range(60):
        session.load("0", team.files["later"], replace=True)
        session.unload(str(1 + turn % 19))
        session.load(str(1 + turn % 19), team.files["later"])
    assert session._way._bank._count == count
    assert_rows(session, team, [str(number) for number in range(ROWS)], dict.fromkeys(known, "later"))


def test_on_a_device_slots_are_copied_after_a_load_and_never_in_a_run(team: Team, pretended_device: list) -> None:
    session = AdapterSession(team.model)
    session.load("first", team.files["first"])
    session.load("lora", team.files["lora"])
    assert_rows(session, team, ["first", "lora", None] * 4)
    assert len(pretended_device) == len(read_adapter_file(team.files["first"]).values)  # both adapters in one go
    pretended_device.clear()
    for names in (["lora"] * 12, [None, "first"] * 6, ["first", "lora", None] * 4):
        assert_rows(session, team, names)
    session.unload("lora")
    assert_rows(session, team, ["first", None] * 6)
    assert pretended_device == []
    for name in ("first", "later"):  # into the slot that became free, in arrays as they are and in larger ones
        session.load("lora", team.files[name], replace=True)
        assert_rows(session, team, ["first", "lora", None] * 4, {"lora": name})


def test_what_is_not_one_adapter_per_row(team: Team, make_export: Callable, tmp_path: Path) -> None:
    session = AdapterSession(team.model)
    session.load("first", team.files["first"])
    with pytest.raises(UserError, match="1 adapters for 12 rows"):
        session.run(IDS, adapters=["first"])
    with pytest.raises(UserError, match=r"No adapter 'second' is loaded\. Loaded: 'first'"):
        session.run(IDS, adapters=["first", "second"] * 6)
    with pytest.raises(UserError, match="the model takes input_ids"):  # slots are the session's own affair
        session.run(IDS | {"adapter_ids": np.full(ROWS, 99)}, adapter="first")
    with pytest.raises(UserError, match="no scale per run"):
        session.run(IDS, adapter="first", scale=0.5)
    with pytest.raises(TypeError):
        session.run(IDS, adapter="first", adapters=["first"] * ROWS)
    swappable = make_export(swappable="base")
    with pytest.raises(UserError, match="one adapter per batch"):
        AdapterSession(swappable.model).run(IDS, adapters=[None] * ROWS)
    with pytest.raises(UserError, match="another export"):
        session.load("bad", swappable.model.with_name(f"{swappable.adapter.name}.onnx_adapter"))
    with pytest.raises(UserError, match="'a/b', which is to be a file's too"):
        export_grouped({"a/b": swappable.adapter}, tmp_path / "model.onnx", ExportOptions(base_model=swappable.base))


def test_a_limit_in_bytes(team: Team) -> None:
    session = AdapterSession(team.model, max_bytes=sum(team.files[name].stat().st_size for name in ("lora", "later")))
    for name in ("first", "lora", "later"):
        session.load(name, team.files[name])
    assert {name: info.resident for name, info in session.adapters.items()} == {
        "first": False,
        "lora": True,
        "later": True,
    }
    # More in one batch than may stay: each is there for as long as the run lasts.
    assert_rows(session, team, ["first", "lora", "later"] * 4)


def test_threads_while_slots_come_and_go(team: Team) -> None:
    session = AdapterSession(team.model)
    for name in team.files:
        session.load(name, team.files[name])

    def churn(turn: int) -> None:
        for number in range((turn + 1) % 12):
            session.load(f"passing {number}", team.files["lora"], replace=True)
        session.load("first", team.files["first"], replace=True)
        for number in range((turn + 1) % 12):
            session.unload(f"passing {number}")

    def ask(number: int) -> None:
        for turn in range(25):
            names = ["first", "lora", None, "later"] * 3
            assert_rows(session, team, names[(number + turn) % 4 :] + names[: (number + turn) % 4])

    ask_while(churn, ask)


def test_the_files_hold_each_adapter_whole(team: Team) -> None:
    first, later = (read_adapter_file(team.files[name]).values for name in ("first", "later"))
    assert first.keys() == later.keys()
    assert {"classifier.slots.weight", "bert.encoder.layer.0.attention.self.query.lora_A.weight"} <= first.keys()
