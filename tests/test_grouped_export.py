"""Grouped exports: each row against the PEFT model of that row's adapter; slots refilled; what is refused."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import tiny
from loratrf_deploy import create_session, read_adapter
from loratrf_deploy.cli import inspect as inspect_cli
from loratrf_deploy.cli import parity as parity_cli
from loratrf_deploy.cli.export import main
from loratrf_deploy.export import ExportOptions, export_grouped
from loratrf_deploy.formats.adapter_file import read_adapter_file
from loratrf_deploy.formats.fit import fit
from loratrf_deploy.formats.manifest import read_swappable
from loratrf_deploy.parity.grouped import check_grouped_parity
from loratrf_deploy.pytorch.base import load_base, sample_inputs
from loratrf_deploy.pytorch.oracle import load_reference
from loratrf_deploy.runtime.slots import Slots
from shared import edit_json, edit_tensors, read_json

LIMIT = {"float32": 1e-5, "float16": 2e-3}
QUERY = "bert.encoder.layer.0.attention.self.query"

# Other ranks and alphas, one half only, other layers, plain LoRA beside LoRATRF: what a team's adapters look like.
ADAPTERS = {
    "both": {"kind": "loratrf", "r": 4, "filter_rank": 3, "seed": 1},
    "plain": {"kind": "lora", "r": 9, "seed": 2, "lora_alpha": 3},
    "query only": {"kind": "loratrf", "r": 2, "filter_rank": 5, "seed": 3, "target_modules": ["query"]},
    "filters alone": {"kind": "loratrf", "seed": 4, "target_modules": ["key"], "filter_target_modules": ["value"]},
}


@pytest.fixture(scope="module")
def grouped(make_tiny, tmp_path_factory):
    """(base, {name: adapter folder}, model)"""
    adapters = {}
    for name, options in ADAPTERS.items():
        base, adapters[name] = make_tiny("bert", "text-classification", **options)
    out = tmp_path_factory.mktemp("grouped") / "model.onnx"
    export_grouped(adapters, out, ExportOptions(base_model=base, check=False))
    return base, adapters, out


def torch_outputs(base, adapters, inputs, dtype="float32"):
    """PyTorch's first output by adapter, and by None for the base without any."""
    values = {name: torch.from_numpy(value) for name, value in inputs.items()}
    results = {}
    for name, path in adapters.items():
        model = load_reference(read_adapter(path), base, dtype=dtype).model.get_base_model()
        with torch.no_grad():
            results[name] = model(**values)[0].numpy()
    bare = load_base(read_adapter(next(iter(adapters.values()))), base, dtype="float32").model
    with torch.no_grad():
        results[None] = bare.to(getattr(torch, dtype)).float()(**values)[0].numpy()
    return results


def sample(base, adapter, batch, sequence, seed=0):
    return sample_inputs(load_reference(read_adapter(adapter), base), batch=batch, sequence=sequence, seed=seed)


def assert_rows(outputs, results, rows, dtype="float32"):
    for row, name in enumerate(rows):
        wanted = results[name][row]
        error = np.abs(outputs[row].astype(np.float64) - wanted).max() / np.abs(wanted).max()
        assert error <= LIMIT[dtype], f"row {row} ({name}): {error:.2e}"


@pytest.mark.parametrize("library", [True, False])
def test_every_row_is_its_own_adapters(grouped, library):
    base, adapters, model = grouped
    names = [*adapters, None]
    rows = [*names, *names[::-1], "plain", "plain", None, "both"]
    inputs = sample(base, adapters["both"], len(rows), 13)
    results = torch_outputs(base, adapters, inputs)
    # The adapters differ by far more than the limit, so that a row with another's weights is noticed.
    spread = min(np.abs(results[a] - results[b]).max() for a in names for b in names if a != b)
    assert spread > 1000 * LIMIT["float32"]
    slots = {**{name: slot for slot, name in enumerate(adapters)}, None: -1}
    session = create_session(model, library=library)
    (outputs,) = session.run(None, inputs | {"adapter_ids": np.array([slots[name] for name in rows])})
    assert_rows(outputs, results, rows)
    for name in names:
        ids = np.full(len(rows), slots[name])
        assert_rows(session.run(None, inputs | {"adapter_ids": ids})[0], results, [name] * len(rows))


def test_the_graph_and_the_manifest(grouped):
    _, adapters, path = grouped
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert shapes["adapter_ids"] == ["batch"]
    assert shapes[f"{QUERY}.lora_A.weight"] == ["slots", f"{QUERY}.R", 32]
    assert shapes["classifier.slots.weight"] == ["slots", 3, 32]
    defaults = {value.name: list(value.dims) for value in model.graph.initializer}
    key = "bert.encoder.layer.1.attention.self.key"
    assert defaults[f"{QUERY}.lora_A.weight"] == [4, 9, 32]
    assert defaults[f"{QUERY}.trf_C.weight"] == [4, 5, 32]
    assert defaults[f"{key}.lora_B.weight"] == [4, 32, 4]
    assert defaults[f"{key}.trf_D.weight"] == [4, 32, 0]  # no adapter has a filter there
    assert {node.op_type for node in model.graph.node if node.domain == "com.loratrf"} == {
        "GroupedLoraTrf",
        "GroupedLinear",
    }
    manifest = read_json(path.parent / "loratrf.json")
    assert manifest["mode"] == "grouped"
    assert manifest["swappable"]["slots"] == {name: slot for slot, name in enumerate(adapters)}
    assert {row["module"]: (row["rank"], row["filter_rank"]) for row in manifest["layers"]}[QUERY] == (9, 5)


def test_slots_are_refilled_without_a_new_session(grouped, make_tiny, tmp_path):
    base, adapters, model = grouped
    # Two strangers to the export, one of a higher rank than any in it, in a session of three slots.
    newcomers = {
        "new": make_tiny(r=21, filter_rank=11, seed=31)[1],
        "filter on key": make_tiny(seed=32, target_modules=["key"])[1],
        "both": adapters["both"],
    }
    manifest, contract = read_swappable(model)
    slots = Slots(contract.weights, 3)
    for slot, path in enumerate(newcomers.values()):
        slots.put(slot, fit(read_adapter(path), contract.weights, manifest.adapter.filter_input))
    session = create_session(model)
    rows = ["new", None, "both", "filter on key", "new"]
    ids = np.array([0, -1, 2, 1, 0])
    inputs = sample(base, adapters["both"], len(rows), 9)
    results = torch_outputs(base, newcomers, inputs)
    assert_rows(session.run(None, inputs | slots.values | {"adapter_ids": ids})[0], results, rows)
    # Replaced in place: the slot is the newcomer's, the others are as they were.
    slots.put(0, fit(read_adapter(adapters["plain"]), contract.weights, manifest.adapter.filter_input))
    results = torch_outputs(base, adapters | newcomers, inputs)
    rows = ["plain", None, "both", "filter on key", "plain"]
    assert_rows(session.run(None, inputs | slots.values | {"adapter_ids": ids})[0], results, rows)
    # As --onto converts it.
    new = tmp_path / "new.onnx_adapter"
    command = ["--adapter", newcomers["new"], "--onto", model, "--base-model", base, "--out", new]
    assert main([str(part) for part in command]) == 0
    slots.put(1, read_adapter_file(new).values)
    rows[3] = "new"
    assert_rows(session.run(None, inputs | slots.values | {"adapter_ids": ids})[0], results, rows)
    # And what the file holds is untouched.
    outputs = session.run(None, inputs | {"adapter_ids": np.array([0, 1, 2, 3, -1])})[0]
    assert_rows(outputs, results, [*adapters, None])


@pytest.mark.parametrize("library", [True, False])
def test_ids_out_of_range_are_errors(grouped, library):
    base, adapters, model = grouped
    inputs = sample(base, adapters["both"], 2, 5)
    session = create_session(model, library=library)
    for wrong in (4, -2, 2**40):
        with pytest.raises(Exception, match=r"adapter_ids\[1\] is|out of data bounds"):
            session.run(None, inputs | {"adapter_ids": np.array([0, wrong])})
    with pytest.raises(Exception, match=r"adapter_ids is \(1\), expected \(batch = 2\)|reshaped"):
        session.run(None, inputs | {"adapter_ids": np.array([0])})
    with pytest.raises(Exception, match="adapter_ids"):  # no default: forgetting it is not the base's answer
        session.run(None, inputs)


@pytest.mark.parametrize(
    ("family", "task", "dtype"),
    [
        ("vit", "image-classification", "float32"),
        ("distilbert", "question-answering", "float32"),
        ("modernbert", "token-classification", "float32"),
        ("roberta", "text-classification", "float16"),
        ("electra", "feature-extraction", "float32"),
    ],
)
def test_families_and_tasks(make_tiny, tmp_path, family, task, dtype):
    base, first = make_tiny(family, task, "loratrf")
    adapters = {"first": first, "second": make_tiny(family, task, "loratrf", r=7, seed=2)[1]}
    export_grouped(adapters, tmp_path / "model.onnx", ExportOptions(base_model=base, dtype=dtype, check=False))
    inputs = sample(base, first, 4, 11)
    results = torch_outputs(base, adapters, inputs, dtype)
    feeds = {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in inputs.items()}
    for library in (True, False):
        session = create_session(tmp_path / "model.onnx", library=library)
        outputs = session.run(None, feeds | {"adapter_ids": np.array([1, -1, 0, 1])})[0]
        assert_rows(outputs, results, ["second", None, "first", "second"], dtype)


def test_filter_on_the_base_output(make_tiny, tmp_path):
    base, first = make_tiny(kind="loratrf", filter_input="base")
    adapters = {"first": first, "second": make_tiny(kind="loratrf", filter_input="base", seed=2)[1]}
    export_grouped(adapters, tmp_path / "model.onnx", ExportOptions(base_model=base, check=False))
    inputs = sample(base, first, 3, 11)
    results = torch_outputs(base, adapters, inputs)
    for library in (True, False):
        session = create_session(tmp_path / "model.onnx", library=library)
        outputs = session.run(None, inputs | {"adapter_ids": np.array([1, -1, 0])})[0]
        assert_rows(outputs, results, ["second", None, "first"])


def test_a_base_without_a_head_gives_zeros_for_no_adapter(make_tiny, tmp_path):
    # A bare encoder: the adapters bring the head, and what lacks one must not answer by chance.
    base = tiny.make_base(tmp_path / "base", "bert", "feature-extraction")
    with_head, adapter = make_tiny()
    # The adapter's own base has the same sizes, so its weights fit.
    assert with_head != base
    result = export_grouped({"a": adapter}, tmp_path / "out" / "model.onnx", ExportOptions(base_model=base))
    assert result.parity is not None
    assert result.parity.passed
    inputs = sample(base, adapter, 2, 5)
    logits = create_session(result.model).run(None, inputs | {"adapter_ids": np.array([-1, 0])})[0]
    assert (logits[0] == 0).all()
    assert (logits[1] != 0).all()


def test_the_command_proves_what_it_writes(make_tiny, tmp_path, capsys):
    base, a = make_tiny("distilbert", kind="loratrf")
    b = make_tiny("distilbert", kind="lora", seed=5)[1]
    out = tmp_path / "out" / "model.onnx"
    command = ["--adapters", f"mixed rows={a}", f"b={b}", "--base-model", str(base), "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for word in ("grouped", "0 mixed rows, 1 b; -1 is the base", "2 GroupedLoraTrf", "logits (b)", "Parity holds"):
        assert word in shown
    assert inspect_cli.main([str(out)]) == 0
    assert "one per batch row, by slot: 0 mixed rows, 1 b" in capsys.readouterr().out

    def parity(*more):
        return parity_cli.main(["--model", str(out), *more, "--base-model", str(base)])

    # Proven again by name; in whatever order.
    assert parity("--adapters", f"b={b}", f"mixed rows={a}") == 0
    assert "Parity holds (10 passed)" in capsys.readouterr().out
    # One alone, in a slot of its own.
    assert parity("--adapter", str(a)) == 0
    assert "Parity holds (4 passed)" in capsys.readouterr().out
    # Swapped names: each slot is then another's.
    assert parity("--adapters", f"b={a}", f"mixed rows={b}") == 1
    assert "Parity failed" in capsys.readouterr().out
    for more, problem in (
        (["--adapters", f"b={b}"], "holds the adapters mixed rows, b, and was to be compared with b"),
        (
            ["--adapters", f"b={b}", f"mixed rows={a}", "--inputs", str(out)],
            "--inputs, --evaluate and --providers go with --adapter",
        ),
    ):
        assert parity(*more) == 2
        assert problem in capsys.readouterr().err


def test_parity_finds_one_wrong_row(grouped, tmp_path):
    base, adapters, model = grouped
    folder = Path(shutil.copytree(model.parent, tmp_path / "copy"))
    program = onnx.load(folder / "model.onnx")
    (weight,) = [value for value in program.graph.initializer if value.name == f"{QUERY}.lora_B.weight"]
    values = onnx.numpy_helper.to_array(weight).copy()
    values[1] *= 1.01  # "plain", by one percent in one layer
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(program, folder / "model.onnx")
    facts = read_json(folder / "loratrf.json")["model"]
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    edit_json(folder / "loratrf.json", model=facts | {"sha256": digest})
    report = check_grouped_parity(folder / "model.onnx", adapters, base)
    assert not report.passed
    failed = {check.output for check in report.checks if check.status == "failed"}
    assert failed == {"logits (plain)", "logits (mixed rows)"}


def test_adapters_that_do_not_go_together(make_tiny, tmp_path, refused):
    base, a = make_tiny(kind="loratrf")
    out = tmp_path / "out" / "model.onnx"

    def with_base(*adapters):
        return refused(out, "--adapters", *adapters, "--base-model", base)

    def against(task="text-classification", kind="loratrf", **options):
        return with_base(f"a={a}", f"other={make_tiny('bert', task, kind, **options)[1]}")

    text = against(filter_input="base")
    assert 'filter_input "base", the model\'s "adapted"' in text
    text = against("text-classification", "lora", bias="all")
    assert "it trains biases of the base model" in text
    text = against("text-classification", "lora", use_dora=True)
    assert "The adapter other is a DoRA" in text
    text = against(modules_to_save=["classifier", "pooler"])
    assert "pooler.dense.weight" in text
    text = against(r=1025, target_modules=["query"])
    assert "ranks over 1024" in text
    headless = Path(shutil.copytree(make_tiny(kind="lora")[1], tmp_path / "headless"))
    edit_tensors(
        headless / "adapter_model.safetensors",
        lambda tensors: {key: value for key, value in tensors.items() if "classifier" not in key},
    )
    edit_json(headless / "adapter_config.json", modules_to_save=None)
    text = with_base(f"a={a}", f"headless={headless}")
    assert "takes classifier.weight from its adapter, which brings none" in text
    five = tiny.make_base(tmp_path / "five", "bert", num_labels=5)
    labels = tiny.make_adapter(five, tmp_path / "labels", "loratrf")
    wide = tiny.make_base(tmp_path / "wide", "bert", hidden_size=64, num_hidden_layers=3)
    wider = tiny.make_adapter(wide, tmp_path / "wider", "loratrf", seed=2)
    text = with_base(f"a={a}", f"wider={wider}")
    assert f"The adapter {wider}" in text
    assert "the base model has no layer bert.encoder.layer.2" in text
    for name in ("../a", "sub/a", ".a", "a\nb", "a" * 61):
        assert "which is to be a file's too" in with_base(f"{name}={a}")
    # Without --base-model, the two name two bases.
    text = refused(out, "--adapters", f"a={a}", f"labels={labels}")
    assert "name different base models" in text
    layer_norm = make_tiny(kind="loratrf", modules_to_save=["classifier", "LayerNorm"])[1]
    text = with_base(f"a={layer_norm}")
    assert "a LayerNorm" in text


def test_positions_that_all_rows_share_become_each_rows_own(make_tiny, tmp_path, refused, monkeypatch):
    # DeBERTa projects its relative positions through the same query_proj and key_proj.
    layers = ["query_proj", "key_proj", "value_proj"]
    base, both = make_tiny("deberta-v2", kind="loratrf", target_modules=layers)
    adapters = {
        "both": both,
        "query": make_tiny("deberta-v2", kind="lora", r=7, seed=2, target_modules=["query_proj"])[1],
    }
    export_grouped(adapters, tmp_path / "out" / "model.onnx", ExportOptions(base_model=base, check=False))
    rows = ["query", None, "both", "both", "query"]
    inputs = sample(base, both, len(rows), 13)
    results = torch_outputs(base, adapters, inputs)
    for library in (True, False):
        session = create_session(tmp_path / "out" / "model.onnx", library=library)
        ids = np.array([-1 if name is None else list(adapters).index(name) for name in rows])
        assert_rows(session.run(None, inputs | {"adapter_ids": ids})[0], results, rows)
    # Where a family shares such a table and nobody expands it, rows can't differ: refused.
    monkeypatch.setattr("loratrf_deploy.export.positions.positions_by_row", contextlib.nullcontext)
    text = refused(tmp_path / "other" / "model.onnx", "--adapters", f"a={both}", "--base-model", base)
    assert "query_proj, deberta.encoder.layer.0.attention.self.key_proj also runs on what is no row" in text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--adapters", "a"], "--adapters has 'a', expected NAME=PATH"),
        (["--adapters", "=x"], "--adapters has '=x'"),
        (["--adapters", "a=x", "a=y"], "--adapters names 'a' twice (x and y)"),
        (["--adapters", "a=nowhere"], "No folder at nowhere"),
        (["--adapters", "a=x", "--mode", "merged"], "--mode is for one adapter"),
        (["--adapters", "a=x", "--swappable", "base"], "--swappable is for one adapter"),
        (
            ["--adapters", "a=x", "--onto", "m.onnx"],
            "--out {out} is to be a folder: with --adapters it gets a file for",
        ),
    ],
)
def test_the_command_line(capsys, tmp_path, arguments, problem):
    out = tmp_path / "out" / "model.onnx"
    assert main([*arguments, "--out", str(out)]) == 2
    assert problem.replace("{out}", str(out)) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
