"""One base, many tasks: classification of texts and tokens and embeddings in one model, one session, one batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers

import tiny
from loratrf_deploy import AdapterSession, UserError, create_session
from loratrf_deploy.cli import inspect as inspect_cli
from loratrf_deploy.cli import parity as parity_cli
from loratrf_deploy.export import ExportOptions, export_grouped
from loratrf_deploy.export.onto import convert_adapter
from loratrf_deploy.export.proven import ExportResult
from loratrf_deploy.parity.grouped import check_grouped_parity
from shared import read_json

LIMIT = 1e-5
CLASSES = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "feature-extraction": transformers.AutoModel,
}
OUTPUT = {
    "text-classification": "logits",
    "token-classification": "token_logits",
    "feature-extraction": "last_hidden_state",
}
SAVED = {
    "bert": (["classifier", "pooler"], ["classifier"]),
    "distilbert": (["classifier", "pre_classifier"], ["classifier"]),
    "deberta-v2": (["classifier", "pooler"], ["classifier"]),
}
"""By family, what adapters for texts and for tokens save; the classifier alone where it isn't named."""


class Member(NamedTuple):
    """An adapter of a team: its folder, its task and how many labels it has."""

    path: Path
    task: str
    labels: int | None


class Team(NamedTuple):
    """Adapters by name in the order of their slots, and the model of all of them."""

    base: Path
    members: dict[str, Member]
    result: ExportResult

    @property
    def model(self) -> Path:
        return self.result.model


def make_members(make_tiny: Callable, family: str) -> tuple[Path, dict[str, Member]]:
    """Four adapters of three tasks: two and five labels, LoRA and LoRATRF, on a base that has no head at all."""
    texts, tokens = SAVED.get(family, (["classifier"], ["classifier"]))
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "spam": ("text-classification", {"kind": "loratrf", "labels": 2, "modules_to_save": texts}),
        "topic": ("text-classification", {"kind": "lora", "labels": 5, "modules_to_save": texts, "r": 7}),
        "ner": ("token-classification", {"kind": "loratrf", "labels": 4, "modules_to_save": tokens, "r": 2}),
        "similar": ("feature-extraction", {"kind": "lora"}),
    }
    members = {}
    for seed, (name, (task, options)) in enumerate(wanted.items(), 1):
        base, path = make_tiny(family, "feature-extraction", for_task=task, seed=seed, **options)
        members[name] = Member(path, task, options.get("labels"))
    return base, members


def export(base: Path, members: dict[str, Member], out: Path, **options: Any) -> ExportResult:
    paths = {name: member.path for name, member in members.items()}
    return export_grouped(paths, out, ExportOptions(base_model=base, pooling="mean", **options))


@pytest.fixture(scope="module")
def team(make_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Team:
    base, members = make_members(make_tiny, "bert")
    named = Path(shutil.copytree(members["spam"].path, tmp_path_factory.mktemp("named") / "spam"))
    (named / "config.json").write_text(json.dumps({"id2label": {"0": "ham", "1": "spam"}}))
    members["spam"] = members["spam"]._replace(path=named)
    return Team(base, members, export(base, members, tmp_path_factory.mktemp("team") / "model.onnx"))


def sample(rows: int, length: int, seed: int = 0, vocabulary: int = 60) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = (np.arange(length) < rng.integers(2, length + 1, rows)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, rng.integers(5, vocabulary, (rows, length)), 0)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def torch_answer(base: Path, member: Member, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What transformers and PEFT alone make of `inputs`: no code of ours but LoRATRF's layers."""
    sizes = {} if member.labels is None else {"num_labels": member.labels, "ignore_mismatched_sizes": True}
    model = CLASSES[member.task].from_pretrained(base, **sizes)
    adapted = peft.PeftModel.from_pretrained(model, str(member.path)).eval().get_base_model()
    with torch.no_grad():
        return adapted(**{name: torch.from_numpy(value) for name, value in inputs.items()})[0].numpy()


def assert_near(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    error = np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max()
    assert error <= LIMIT, f"{error:.2e}"


def assert_answers(base: Path, members: dict[str, Member], model: Path, taken: list[str]) -> None:
    """Every row of a mixed batch against PyTorch's own model of that row's adapter, with the library and without."""
    names = list(members)
    inputs = {name: value for name, value in sample(9, 11).items() if name in taken}
    rows = [names[row % len(names)] for row in range(9)]
    ids = np.array([names.index(name) for name in rows])
    wanted = {name: torch_answer(base, member, inputs) for name, member in members.items()}
    for library in (True, False):
        session = create_session(model, library=library)
        outputs = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, inputs | {"adapter_ids": ids}), strict=True)
        )
        for row, name in enumerate(rows):
            member = members[name]
            got, mask = outputs[OUTPUT[member.task]][row], inputs["attention_mask"][row].astype(bool)
            if member.task == "text-classification":
                assert_near(got[: member.labels], wanted[name][row])
            else:
                assert_near(got[mask, : member.labels], wanted[name][row][mask])


def test_every_row_is_answered_by_its_own_task(team: Team) -> None:
    assert_answers(team.base, team.members, team.model, ["input_ids", "attention_mask", "token_type_ids"])
    onnx.checker.check_model(str(team.model))
    # The trunk runs once, whatever stands behind it.
    nodes = onnx.load(team.model, load_external_data=False).graph.node
    assert sum(node.op_type == "GroupedLoraTrf" for node in nodes) == 4
    assert sum(node.op_type == "GroupedLinear" for node in nodes) == 3


@pytest.mark.parametrize(
    "family",
    ["distilbert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "electra", "deberta-v2"))],
)
def test_heads_of_other_families(make_tiny: Callable, tmp_path: Path, family: str) -> None:
    base, members = make_members(make_tiny, family)
    result = export(base, members, tmp_path / "model.onnx", check=False)
    taken = [value.name for value in create_session(result.model).get_inputs()]
    assert_answers(base, members, result.model, [name for name in taken if name != "adapter_ids"])


def test_heads_behind_a_head_of_the_base(make_tiny: Callable, tmp_path: Path) -> None:
    """ModernBERT's own head stands before every classifier, and comes with the base; its labels are three."""
    base, first = make_tiny("modernbert", labels=2)
    members = {
        "two": Member(first, "text-classification", 2),
        "ner": Member(
            make_tiny("modernbert", kind="lora", for_task="token-classification", labels=4, seed=2)[1],
            "token-classification",
            4,
        ),
    }
    paths = {name: member.path for name, member in members.items()}
    answers = {"for_task": "question-answering", "labels": 2, "modules_to_save": ["classifier"], "seed": 3}
    paths["qa"] = make_tiny("modernbert", kind="lora", **answers)[1]
    result = export_grouped(paths, tmp_path / "model.onnx", ExportOptions(base_model=base))
    assert result.parity is not None
    assert result.parity.passed
    assert {"start_logits (qa)", "end_logits (qa)"} <= {check.output for check in result.parity.checks}
    assert_answers(base, members, result.model, ["input_ids", "attention_mask"])


@pytest.mark.slow
def test_saved_poolers_stay_exact_in_int8(make_tiny: Callable, tmp_path: Path) -> None:
    base, members = make_members(make_tiny, "bert")
    parity = export(base, members, tmp_path / "model.onnx", quantize="int8").parity
    assert parity is not None
    assert parity.passed
    assert ("quantised", "logits (mixed rows)") in {(check.variant, check.output) for check in parity.checks}


def test_families_and_tasks_that_share_no_trunk(make_tiny: Callable, tmp_path: Path, refused: Callable) -> None:
    base = tiny.make_base(tmp_path / "base", "mpnet", "feature-extraction")
    options = {"target_modules": ["q", "v"]}
    texts = tiny.make_adapter(base, tmp_path / "texts", for_task="text-classification", labels=2, **options)
    plain = tiny.make_adapter(base, tmp_path / "plain", **options)
    command = ["--adapters", f"texts={texts}", f"plain={plain}", "--base-model", base]
    text = refused(tmp_path / "out" / "model.onnx", *command)
    assert "can't be made of a base of model_type mpnet" in text
    assert "bert, roberta, distilbert, electra, deberta-v2, modernbert" in text


def test_the_proof_names_adapters_and_tasks(team: Team) -> None:
    report = team.result.parity
    assert report is not None
    assert report.passed
    shown = {check.output for check in report.checks if check.variant == "with library"}
    assert shown == {
        *("logits (spam)", "logits (topic)", "token_logits (ner)"),
        *(f"{name} (similar)" for name in ("sentence_embedding", "last_hidden_state")),
        *(
            f"{name} ({rows})"
            for name in ("logits", "token_logits", "sentence_embedding", "last_hidden_state")
            for rows in ("id -1", "mixed rows")
        ),
    }
    assert "ner (token-classification)=" in report.adapter
    assert (
        max(check.figures.relative for check in report.checks if check.variant != "base-off" and check.figures) <= LIMIT
    )


def test_labels_that_an_adapter_lacks_never_win(team: Team) -> None:
    inputs, names = sample(8, 7, seed=3), list(team.members)
    session = create_session(team.model)
    ids = np.array([names.index(name) for name in ("spam", "topic", "ner", "similar")] * 2)
    logits, tokens = session.run(["logits", "token_logits"], inputs | {"adapter_ids": ids})
    assert (logits.shape, tokens.shape) == ((8, 5), (8, 7, 4))
    lowest = np.finfo(np.float32).min
    assert (logits[[0, 4], 2:] == lowest).all()
    share = torch.softmax(torch.from_numpy(logits), -1).numpy()
    assert (share[[0, 4], 2:] == 0).all()
    np.testing.assert_allclose(share.sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(logits[[0, 4]].argmax(-1), logits[[0, 4], :2].argmax(-1))
    # A row of another task, and one of the base, which has no head: nothing at all.
    assert (logits[[2, 3, 6, 7]] == 0).all()
    assert (tokens[[0, 1, 3, 4, 5, 7]] == 0).all()
    base = session.run(["logits", "token_logits"], inputs | {"adapter_ids": np.full(8, -1)})
    assert not any(value.any() for value in base)


def test_what_loratrf_json_and_inspect_say(team: Team, capsys: pytest.CaptureFixture) -> None:
    said = read_json(team.model.parent / "loratrf.json")
    assert said["task"] == "text-classification + token-classification + feature-extraction"
    adapters = said["swappable"]["adapters"]
    assert {name: (adapter["task"], adapter["labels"]) for name, adapter in adapters.items()} == {
        "spam": ("text-classification", ["ham", "spam"]),
        "topic": ("text-classification", [f"LABEL_{number}" for number in range(5)]),
        "ner": ("token-classification", [f"LABEL_{number}" for number in range(4)]),
        "similar": ("feature-extraction", None),
    }
    assert said["embedding"] == {"pooling": "mean", "normalize": False, "dimensions": None}
    assert {task: part["outputs"] for task, part in said["swappable"]["tasks"].items()} == {
        "text-classification": {"logits": "logits"},
        "token-classification": {"logits": "token_logits"},
        "feature-extraction": {name: name for name in ("last_hidden_state", "sentence_embedding")},
    }
    capsys.readouterr()
    assert inspect_cli.main([str(team.model)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "0 spam: text-classification (ham, spam), in logits" in shown
    assert "3 similar: feature-extraction, in last_hidden_state, sentence_embedding" in shown
    assert inspect_cli.main([str(team.model.with_name("spam.onnx_adapter"))]) == 0
    assert "text-classification (ham, spam)" in " ".join(capsys.readouterr().out.split())


def test_a_session_gives_each_row_its_own_answer(team: Team, make_tiny: Callable, tmp_path: Path) -> None:
    session = AdapterSession(team.model)
    for name in team.members:
        session.load(name, team.model.with_name(f"{name}.onnx_adapter"))
    assert session.adapters["spam"].task == "text-classification"
    assert session.adapters["spam"].labels == ("ham", "spam")
    inputs = sample(6, 9, seed=5)
    rows = ["ner", "spam", None, "similar", "topic", "spam"]
    answers = session.answers(inputs, adapters=rows)
    raw = session.run(inputs, adapters=rows)
    shapes = [{name: value.shape for name, value in answer.outputs.items()} for answer in answers]
    assert shapes[0] == {"token_logits": (9, 4)}
    assert shapes[1] == shapes[5] == {"logits": (2,)}
    assert shapes[2] == {name: value[0].shape for name, value in raw.items()}
    assert shapes[3] == {"sentence_embedding": (32,), "last_hidden_state": (9, 32)}
    assert shapes[4] == {"logits": (5,)}
    assert [answer.labels for answer in answers[1:4]] == [("ham", "spam"), None, None]
    assert [answer.task for answer in answers[:3]] == ["token-classification", "text-classification", None]
    for row, name in enumerate(rows):
        if name is not None:
            wanted = torch_answer(team.base, team.members[name], inputs)[row]
            assert_near(answers[row].outputs[OUTPUT[team.members[name].task]], wanted)
    # A name is given to an adapter of another task and another number of labels: so is its slot.
    member = Member(
        make_tiny("bert", "feature-extraction", for_task="token-classification", labels=3, seed=11, r=9)[1],
        "token-classification",
        3,
    )
    file = tmp_path / "new.onnx_adapter"
    assert convert_adapter(member.path, team.model, file, base_model=team.base, check=True).parity.passed
    session.load("spam", file, replace=True)
    answers = session.answers(inputs, adapters=rows)
    assert_near(answers[1].outputs["token_logits"], torch_answer(team.base, member, inputs)[1])
    assert answers[1].labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert_near(answers[4].outputs["logits"], torch_answer(team.base, team.members["topic"], inputs)[4])
    with pytest.raises(UserError, match="different values for"):
        session.answers(inputs, adapters=[{"topic": 0.5, "similar": 0.5}] * 6)
    (half,) = {answer.task for answer in session.answers(inputs, adapters=[{"topic": 0.5}] * 6)}
    assert half == "text-classification"


def test_adapters_that_the_model_has_no_room_for(
    team: Team, make_tiny: Callable, refused: Callable, tmp_path: Path
) -> None:
    def onto(**options: Any) -> str:
        path = make_tiny("bert", "feature-extraction", **options)[1]
        return refused(
            tmp_path / "x" / "a.onnx_adapter", "--adapter", path, "--onto", team.model, "--base-model", team.base
        )

    text = onto(for_task="token-classification", labels=6, seed=12)
    assert "it has 6 labels (token.classifier.weight), the model has room for 4" in text
    assert "is for question-answering, and the model was exported for text-classification" in onto(
        for_task="question-answering", labels=2
    )
    saves_no_pooler = onto(for_task="text-classification", labels=2, modules_to_save=["classifier"])
    assert "takes bert.pooler.dense.weight from its adapter, which brings none" in saves_no_pooler
    wide = onto(for_task="token-classification", labels=3, target_modules=["query", "intermediate.dense"], seed=13)
    assert "the model takes no low-rank half at bert.encoder.layer.0.intermediate.dense" in wide


def test_parity_by_the_command_line(team: Team, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--model", str(team.model), "--base-model", str(team.base)]
    for name, passed in (("spam", 3), ("similar", 8)):
        capsys.readouterr()
        assert parity_cli.main([*common, "--adapter", str(team.members[name].path)]) == 0
        assert f"Parity holds ({passed} passed" in capsys.readouterr().out
    # By their names, two of one task and as good as of one shape; the one is not the other.
    paths = {name: member.path for name, member in team.members.items()}
    report = check_grouped_parity(team.model, paths | {"spam": paths["topic"], "topic": paths["spam"]}, team.base)
    failed = {check.output for check in report.checks if check.status == "failed"}
    assert failed == {"logits (spam)", "logits (topic)", "logits (mixed rows)"}
