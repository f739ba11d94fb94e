"""Parity: it holds for a faithful export, and a fault of any kind is found, named and counted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from loratrf_deploy import UserError
from loratrf_deploy.cli import parity as parity_cli
from loratrf_deploy.parity import VARIANTS, Check, ParityReport, check_parity, checks, layers, onnx_runs
from loratrf_deploy.parity.figures import Figures, compare, worst
from loratrf_deploy.parity.inputs import complete, read_inputs
from loratrf_deploy.reports.formats import to_markdown

ROW = {"input_ids": [2, 5, 9, 3], "attention_mask": [1, 1, 1, 1], "token_type_ids": [0, 0, 1, 1]}


def corrupted(model: Path, folder: Path, initializer: str) -> Path:
    """A copy of the export in `folder` with one value of one weight changed."""
    # Without its hashes, which would tell.
    shutil.copytree(model.parent, folder, ignore=shutil.ignore_patterns("model.onnx*", "loratrf.json"))
    graph = ir.load(model)
    value = graph.graph.initializers[initializer]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array.flat[array.size // 2] += 1
    value.const_value = ir.tensor(array, name=initializer)
    ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def mute_adapter(make_tiny, tmp_path_factory):
    """The adapter of `make_tiny()` with both halves switched off (B = 0, D = 0) and its trained head kept."""
    _, adapter = make_tiny()
    folder = tmp_path_factory.mktemp("mute") / "adapter"
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, value in tensors.items():
        if "lora_B" in name or "trf_D" in name:
            tensors[name] = np.zeros_like(value)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def mute_model(mute_adapter, tmp_path_factory):
    from loratrf_deploy.export import ExportOptions, export_adapter

    return export_adapter(
        mute_adapter, tmp_path_factory.mktemp("mute") / "model.onnx", ExportOptions(mode="separate", check=False)
    ).model


BIASED = {"lora_bias": True, "target_modules": ["query", "dense"]}


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("loratrf", "separate", {}),
        ("loratrf", "merged", {}),
        ("lora", "merged", {}),
        # A bias that the adapter brings, which the export adds to the frozen layer's and fuses with what follows.
        ("lora", "separate", BIASED),
        ("lora", "merged", BIASED),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*LoRA tensor:UserWarning")  # PEFT takes a bias for a shard
def test_faithful_export_passes_and_no_layer_drifts(make_export, kind, mode, options):
    base, adapter, model = make_export(kind=kind, mode=mode, **options)
    before = {path: path.read_bytes() for path in model.parent.iterdir()}
    report = check_parity(model, adapter, base)
    assert report.passed, report.verdict
    assert [(check.variant, check.output) for check in report.checks] == [
        (variant, "logits") for variant in VARIANTS[:3]
    ]
    assert report.counts == {"passed": 3, "failed": 0, "skipped": 0, "no effect": 0}
    assert not [layer for layer in report.layers if layer.drifts]
    # Every adapted layer is among those compared, and the outputs end the list.
    compared = [layer.module for layer in report.layers]
    for number in (0, 1):
        assert f"bert.encoder.layer.{number}.attention.self.query" in compared
    assert compared[-1] == "logits"
    assert {path: path.read_bytes() for path in model.parent.iterdir()} == before


def test_question_answering_sees_token_types(make_export):
    """PeftModelForQuestionAnswering.forward drops token_type_ids; the reference must not."""
    base, adapter, model = make_export(task="question-answering")
    report = check_parity(model, adapter, base)
    assert report.passed, report.verdict
    assert {check.output for check in report.checks} == {"start_logits", "end_logits"}


@pytest.mark.parametrize(
    ("initializer", "layer"),
    [
        ("bert.encoder.layer.1.attention.self.query.lora_B.weight", "bert.encoder.layer.1.attention.self.query"),
        ("bert.encoder.layer.0.attention.self.value.trf_D.weight", "bert.encoder.layer.0.attention.self.value"),
        ("bert.encoder.layer.1.output.dense.MatMul.weight", "bert.encoder.layer.1.output.dense"),
        ("bert.encoder.layer.0.output.LayerNorm.bias", "bert.encoder.layer.0.output.LayerNorm"),
        ("classifier.bias", "classifier"),
    ],
)
def test_corrupted_weight_is_traced_to_its_layer(make_export, tmp_path, initializer, layer):
    base, adapter, model = make_export()
    report = check_parity(corrupted(model, tmp_path / "bad", initializer), adapter, base)
    assert not report.passed
    assert report.first_drift is not None
    assert report.first_drift.module == layer
    assert layer in report.verdict


def test_another_adapter_fails(make_tiny, make_export):
    base, _, model = make_export()
    _, other = make_tiny(seed=2)
    report = check_parity(model, other, base)
    assert not report.passed
    assert {check.variant for check in report.checks if check.status == "failed"} == {"with library", "without library"}


def test_export_that_lost_its_adapter_fails_by_name(make_tiny, mute_model):
    base, adapter = make_tiny()
    report = check_parity(mute_model, adapter, base)
    (effect,) = [check for check in report.checks if check.variant == "base-off"]
    assert effect.status == "failed"
    assert "equals the base model without the adapter" in effect.reason


def test_adapter_without_effect_is_a_finding(make_tiny, mute_adapter, mute_model):
    """The trained head alone is no effect of the adapter's layers."""
    report = check_parity(mute_model, mute_adapter, make_tiny()[0])
    assert report.passed
    assert report.counts["no effect"] == 1
    assert "the adapter itself changes nothing" in report.checks[-1].reason


def test_float16_has_its_own_tolerance(make_export):
    base, adapter, model = make_export(dtype="float16")
    report = check_parity(model, adapter, base)
    assert (report.dtype, report.tolerance) == ("float16", 2e-3)
    assert report.passed, report.verdict


def test_library_that_is_not_built_is_skipped_by_name(make_export, monkeypatch):
    def missing() -> Path:
        raise UserError("The custom-op library is not built")

    base, adapter, model = make_export()
    monkeypatch.setattr(onnx_runs, "library_path", missing)
    report = check_parity(model, adapter, base)
    assert [(check.variant, check.status) for check in report.checks] == [
        ("with library", "skipped"),
        ("without library", "passed"),
        ("base-off", "passed"),
    ]
    assert report.layers_variant == "without library"


def test_model_that_runs_with_the_library_alone_fails(make_export, tmp_path):
    """One file, any runtime: without its function bodies a model has lost that."""
    base, adapter, model = make_export()
    shutil.copytree(model.parent, tmp_path / "bare", ignore=shutil.ignore_patterns("model.onnx*"))
    graph = ir.load(model)
    graph.functions.clear()
    ir.save(graph, tmp_path / "bare" / "model.onnx", external_data="model.onnx.data")
    report = check_parity(tmp_path / "bare" / "model.onnx", adapter, base)
    assert {check.variant: check.status for check in report.checks} == {
        "with library": "passed",
        "without library": "failed",
        "base-off": "passed",
    }
    assert not report.passed


def test_module_is_known_by_its_last_node():
    """A biased linear layer is a MatMul and then an Add, and the Add holds its output."""
    x, w, b = (ir.Value(name=name) for name in "xwb")
    first = ir.node("MatMul", [x, w], metadata_props={"module": "dense"})
    other = ir.node("Relu", [x], metadata_props={"module": "act"})
    last = ir.node("Add", [first.outputs[0], b], metadata_props={"module": "dense"})
    stray = ir.node("Shape", [x])
    graph = ir.Graph([x, w, b], [last.outputs[0], other.outputs[0]], nodes=[first, other, last, stray])
    found = layers._nodes_by_module(ir.Model(graph, ir_version=10))
    assert list(found.items()) == [("act", other), ("dense", last)]


def test_graph_keeps_its_outputs(make_export):
    _, _, model = make_export()
    graph = ir.load(model)
    nodes = layers._nodes_by_module(graph)
    session, names = layers._session_with_outputs(graph, model, nodes, library=False)
    assert {value.name for value in session.get_outputs()} == {"logits", *names.values()}
    assert [value.name for value in graph.graph.outputs] == ["logits"]


def test_verdict_stands_where_layers_cannot_be_compared(make_export, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("no inner values here")

    base, adapter, model = make_export()
    monkeypatch.setattr(layers, "compare_layers", refuse)
    report = check_parity(model, adapter, base)
    assert report.passed
    assert report.layers == ()
    assert "no inner values here" in to_markdown(report)


def test_nothing_run_is_not_passed():
    skipped = Check("with library", "logits", "skipped", "not built")
    effect = Check("base-off", "logits", "passed")
    report = ParityReport("m", "a", "float32", 1e-5, (skipped, effect), (), "with library", 0, ())
    assert not report.passed
    assert "not proven" in report.verdict


def test_model_of_another_task_is_refused(make_tiny, make_export):
    base, adapter = make_tiny(task="token-classification")
    _, _, model = make_export(task="question-answering")
    with pytest.raises(UserError, match="no counterpart for end_logits, start_logits"):
        check_parity(model, adapter, base)


@pytest.mark.parametrize("content", [b"", b"not an ONNX model", b"\x08\x0a" + bytes(64)])
def test_file_that_is_no_model_is_refused(make_tiny, tmp_path, content):
    base, adapter = make_tiny()
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx"):
        check_parity(tmp_path / "model.onnx", adapter, base)


# Figures


def test_figures_of_known_values():
    a, b = np.array([[1.0, 2.0], [3.0, 4.5]]), np.array([[1.0, 2.0], [3.0, 4.0]])
    figures = compare(a, b, name="logits")
    assert (figures.absolute, figures.relative, figures.top1, figures.choices) == (0.5, 0.125, 1.0, 2)
    assert figures.cosine == pytest.approx(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b))


def test_top1_flip_counts_unless_it_is_a_tie():
    b = np.array([[1.0, 0.0], [1.0, 0.999]])
    flip, tie = np.array([[0.0, 1.0], [1.0, 0.999]]), np.array([[1.0, 0.0], [0.9995, 0.9996]])
    assert (compare(flip, b, name="logits", tolerance=1e-3).flips, compare(flip, b, name="logits").top1) == (1, 0.5)
    tied = compare(tie, b, name="logits", tolerance=1e-3)
    assert (tied.flips, tied.ties, tied.top1) == (0, 1, 0.5)
    assert compare(tie, b, name="logits", tolerance=1e-5).flips == 1


def test_padded_tokens_do_not_count_but_must_be_finite():
    mask = np.array([[True, False], [True, True]])
    b = np.ones((2, 2, 3))
    a = b.copy()
    a[0, 1] = 7
    assert compare(a, b, name="last_hidden_state", mask=mask).absolute == 0
    a[0, 1, 0] = np.nan
    assert np.isinf(compare(a, b, name="last_hidden_state", mask=mask).relative)


def test_spans_choose_among_real_tokens():
    mask = np.array([[True, True, False]])
    a, b = np.array([[1.0, 2.0, 9.0]]), np.array([[1.0, 2.0, 0.0]])
    figures = compare(a, b, name="start_logits", mask=mask)
    assert (figures.absolute, figures.top1) == (0, 1.0)


def test_pooled_output_as_wide_as_the_sequence_is_long_is_not_masked():
    mask = np.array([[True, False], [True, True]])
    assert compare(np.array([[0.0, 5.0], [0.0, 0.0]]), np.zeros((2, 2)), name="logits", mask=mask).absolute == 5


@pytest.mark.parametrize(
    ("a", "b", "relative"),
    [
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([1.0, np.inf], [1.0, 1.0], np.inf),
        ([1.0, 1.0], [1.0, np.nan], np.nan),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1.0], [0.0, 0.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
    ],
)
def test_awkward_values(a, b, relative):
    assert compare(np.array(a), np.array(b)).relative == pytest.approx(relative, nan_ok=True)


def test_worst_keeps_nan_and_weighs_top1():
    one = Figures(1.0, 0.1, 0.9, 1.0, 0, 3, 9)
    two = Figures(2.0, np.nan, np.nan, 0.0, 0, 1, 3)
    both = worst([one, two, one])
    assert both.absolute == 2
    assert np.isnan(both.relative)
    assert np.isnan(both.cosine)
    assert both.top1 == pytest.approx(6 / 7)


def test_batches_share_one_scale():
    """One undecided row, its scores near 0, must not inflate the error of an export that is right elsewhere."""
    expected = [{"logits": np.array([[0.01, 0.02]])}, {"logits": np.array([[1.0, 2.0]])}]
    run = [{"logits": batch["logits"] + 1e-3} for batch in expected]
    figures = checks.over_batches(run, expected, "logits", [None, None], 0.0)
    assert figures.relative == pytest.approx(1e-3 / 2)


# Inputs


@pytest.fixture(scope="module")
def reference(make_tiny):
    from loratrf_deploy.adapters.adapter import read_adapter
    from loratrf_deploy.pytorch.oracle import load_reference

    base, adapter = make_tiny()
    return load_reference(read_adapter(adapter), base)


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_rows_of_texts_and_arrays(reference, tmp_path):
    rows = [{"text": "a film", "label": 1}, {"sentence": "the plot is thin and old"}, ROW]
    rows += [{"sentence1": "a film", "sentence2": "the plot"}, {"question": "where ?", "context": "behind the hall"}]
    rows += [{"text": "the jokes"}]
    batches = read_inputs(
        write_rows(tmp_path / "rows.jsonl", *rows[:2], "", *rows[2:]), reference, Path(reference.path)
    )
    # Neighbouring texts, or pairs of them, share a batch, padded to the longest; the array row stands alone.
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 1, 2, 1]
    assert batches[0]["attention_mask"].sum(1).tolist()[0] < batches[0]["attention_mask"].sum(1).tolist()[1]
    assert set(batches[2]["token_type_ids"].ravel()) == {0, 1}
    assert all(list(batch) == list(reference.input_names) for batch in batches)
    assert batches[1]["input_ids"].tolist() == [ROW["input_ids"]]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "a list, expected a JSON object"),
        ({"label": 1}, "the row has the keys label"),
        ({"text": 3}, "'text' is 3, expected a text"),
        (ROW | {"input_ids": [2, 5, 9, 9999]}, "values from 2 to 9999, the model takes 0 to"),
        (ROW | {"attention_mask": [1, 1]}, r"attention_mask has shape \(1, 2\), but input_ids has \(1, 4\)"),
        (ROW | {"input_ids": [[2, 3], [4]]}, "lists differ in length"),
        (ROW | {"input_ids": ["a"]}, "not an array of numbers"),
        (ROW | {"input_ids": [1.5, 2.5]}, "expected whole numbers"),
        (ROW | {"input_ids": []}, "expected whole numbers"),
        ({"attention_mask": [1]}, "input_ids is missing"),
        ({"input_ids": [2] * 99}, "has 99 tokens, the model takes at most 66"),
    ],
)
def test_bad_row_is_named_by_its_line(reference, tmp_path, row, problem):
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: .*{problem}"):
        read_inputs(write_rows(tmp_path / "rows.jsonl", ROW, row), reference, tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"), [(b"", "has no rows"), (b"\n\n", "has no rows"), (b"\xff", "not UTF-8")]
)
def test_bad_file_of_inputs(reference, tmp_path, content, problem):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read_inputs(tmp_path / "rows.jsonl", reference, tmp_path)


def test_missing_mask_and_types_are_filled_as_transformers_does(reference):
    batch = complete({"input_ids": np.array([2, 5, 3])}, reference)
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0]]


# The command and the suite


def run(*arguments: object) -> int:
    return parity_cli.main([str(argument) for argument in arguments])


def test_command_passes_quietly(make_export, tmp_path, capfd):
    base, adapter, model = make_export()
    inputs = write_rows(tmp_path / "rows.jsonl", {"text": "a wonderful film"}, ROW)
    reports = [tmp_path / f"parity{suffix}" for suffix in (".json", ".md", ".html", ".xml")]
    wanted = [option for path in reports for option in ("--report", path)]
    capfd.readouterr()  # what fixtures printed
    assert run("--model", model, "--adapter", adapter, "--base-model", base, "--inputs", inputs, *wanted) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "Parity holds (3 passed)." in out
    assert "without library" in out
    assert json.loads(reports[0].read_text())["inputs"][0]["input_ids"][0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in [*reports, inputs])


def test_command_fails_with_1_and_names_the_layer(make_export, tmp_path, capfd):
    base, adapter, model = make_export()
    layer = "bert.encoder.layer.0.attention.self.value"
    bad = corrupted(model, tmp_path / "bad", f"{layer}.trf_tau")
    assert run("--model", bad, "--adapter", adapter, "--base-model", base) == 1
    assert f"The first layer that drifts is {layer} " in capfd.readouterr().out
    assert run("--model", bad, "--adapter", adapter, "--base-model", base, "--json") == 1
    out, err = capfd.readouterr()
    facts = json.loads(out)
    assert (facts["passed"], facts["first_drift"], facts["model"], err) == (False, layer, str(bad), "")
    assert run("--model", bad, "--adapter", adapter, "--base-model", base, "--tolerance", "10", "--json") == 0
    assert json.loads(capfd.readouterr().out)["passed"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "{tmp}/none.onnx"}, "No model at"),
        ({"--adapter": "{tmp}/none"}, "No folder at"),
        ({"--inputs": "{tmp}/none.jsonl"}, "No inputs file at"),
        ({"--base-model": "{tmp}/none"}, "none"),
        ({"--report": "{tmp}/report.pdf"}, "unknown format '.pdf'"),
        ({"--report": "{tmp}/none/report.md"}, "does not exist"),
    ],
)
def test_bad_arguments_are_one_paragraph_and_2(make_export, tmp_path, capfd, change, message):
    base, adapter, model = make_export()
    arguments = {"--model": model, "--adapter": adapter, "--base-model": base}
    arguments |= {name: value.format(tmp=tmp_path) for name, value in change.items()}
    capfd.readouterr()  # what fixtures printed
    assert run(*(part for pair in arguments.items() for part in pair)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("tolerance", ["0", "-1", "nan", "inf", "x"])
def test_tolerance_is_a_number_over_zero(tolerance, capfd):
    assert run("--model", "m", "--adapter", "a", "--tolerance", tolerance) == 2
    message = f"error: argument --tolerance: {tolerance!r} is not a number over zero (see loratrf-parity --help)\n"
    assert capfd.readouterr().err == message


def suite(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loratrf_deploy.parity_suite", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_suite_in_a_project_with_options_of_its_own(make_export, tmp_path):
    """A user's conftest.py has its own --model, warnings are errors, and a fault shows as failed tests."""
    base, adapter, model = make_export()
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--model')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\naddopts = --strict-markers\n")
    given = ("--adapter", adapter, "--base-model", base)
    good = suite(tmp_path, "--model", model, *given, "--junitxml", "out.xml", "--report", "parity.json")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "3 passed" in good.stdout
    assert (tmp_path / "out.xml").is_file()
    assert json.loads((tmp_path / "parity.json").read_text())["passed"]

    layer = "bert.encoder.layer.1.attention.self.query"
    bad = suite(tmp_path, "--model", corrupted(model, tmp_path / "bad", f"{layer}.lora_A.weight"), *given)
    assert bad.returncode == 1
    assert "2 failed, 1 passed" in bad.stdout
    assert f"first layer that drifts is {layer}" in bad.stdout


def test_suite_says_what_it_needs(tmp_path):
    result = suite(tmp_path)
    assert result.returncode == 4
    assert "needs --model model.onnx and --adapter PATH" in result.stderr
