"""Swappable exports and --onto: proven against PyTorch with the adapter and without, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from conftest import Exported
from loratrf_deploy import AdapterSession, UserError, create_session, read_adapter
from loratrf_deploy.bench.deployments import Setting, deployments
from loratrf_deploy.cli.export import main
from loratrf_deploy.export import ExportOptions, export_adapter, export_grouped
from loratrf_deploy.export.onto import convert_adapter
from loratrf_deploy.formats.adapter_file import read_adapter_file
from loratrf_deploy.formats.inspection import inspect_path
from loratrf_deploy.parity import case, check_parity
from shared import FRAMEWORKS, IDS, edit_json, edit_tensors, read_json, run_python


def adapter_file(exported: Exported) -> Path:
    return exported.model.with_name(f"{exported.adapter.name}.onnx_adapter")


def assert_proven(exported: Exported, adapter: Path | None = None, *, no_adapter: str = "passed") -> None:
    """Parity with the library and without, an effect of the adapter, and the default: all four passed."""
    report = check_parity(exported.model, adapter or exported.adapter, exported.base)
    passed = dict.fromkeys(("with library", "without library", "base-off"), "passed")
    assert {check.variant: check.status for check in report.checks} == {**passed, "no adapter": no_adapter}, report


@pytest.mark.parametrize("swappable", ["base", "adapter"])
@pytest.mark.consumer("onnxruntime, Python", "swapped")
@pytest.mark.consumer("onnxruntime with our library", "swapped")
def test_any_rank_and_alpha_swap_and_the_default_is_what_was_asked_for(
    make_export: Callable, make_tiny: Callable, swappable: str
) -> None:
    exported = make_export(swappable=swappable)
    assert_proven(exported)
    if swappable == "base":
        _, other = make_tiny(kind="loratrf", r=7, lora_alpha=3, filter_rank=1, filter_gamma=0.7, seed=9)
        assert_proven(exported, other)
        _, patterned = make_tiny(
            "bert", kind="loratrf", use_rslora=True, rank_pattern={"layer.1.attention.self.query": 9}, seed=3
        )
        assert_proven(exported, patterned)


def test_lora_fits_into_a_loratrf_graph_and_covers_fewer_layers_with_explicit_zeros(
    make_export: Callable, make_tiny: Callable, tmp_path: Path
) -> None:
    exported = make_export(swappable="base")
    _, lora = make_tiny(kind="lora", r=5, target_modules=["query"], layers_to_transform=[1])
    assert_proven(exported, lora)
    made = convert_adapter(lora, exported.model, tmp_path / "lora.onnx_adapter")
    assert (made.layers, made.model_layers, made.base_by) == (1, 4, "hash")
    values = read_adapter_file(tmp_path / "lora.onnx_adapter").values
    assert values.keys() == read_adapter_file(adapter_file(exported)).values.keys()
    filled = "bert.encoder.layer.1.attention.self.query.lora_"
    layers = [name for name, value in values.items() if value.any() and not name.startswith("classifier")]
    assert sorted(layers) == [f"{filled}A.weight", f"{filled}B.weight"]


@pytest.mark.parametrize(
    ("family", "task", "dtype"),
    [
        ("bert", "token-classification", "float32"),  # a head that the exporter transposes for MatMul
        ("deberta-v2", "text-classification", "float32"),  # layers that are called twice
        ("vit", "image-classification", "float32"),
        ("roberta", "text-classification", "float16"),  # a head of two layers
    ],
)
def test_families(make_export: Callable, family: str, task: str, dtype: str) -> None:
    assert_proven(make_export(family, task, "loratrf", swappable="base", dtype=dtype))


def test_a_required_adapter_has_no_default_and_a_run_without_one_says_so(
    make_export: Callable, make_tiny: Callable, tmp_path: Path
) -> None:
    exported = make_export(swappable="required")
    graph = onnx.load(exported.model, load_external_data=False).graph
    weights = read_adapter_file(adapter_file(exported)).values
    assert weights.keys() == {value.name for value in graph.input} - set(IDS)
    assert not weights.keys() & {value.name for value in graph.initializer}
    _, other = make_tiny(kind="loratrf", r=7, lora_alpha=3, filter_rank=1, filter_gamma=0.7, seed=9)
    report = check_parity(exported.model, other, exported.base)
    passed = dict.fromkeys(("with library", "without library", "base-off"), "passed")
    assert {check.variant: check.status for check in report.checks} == passed, report
    assert len(report.layers) > 5
    assert inspect_path(exported.folder)["swappable"]["default"] == "required"

    session = AdapterSession(exported.model)
    assert (session.default, {value.name for value in session.inputs}) == ("required", set(IDS))
    inputs = {name: np.ones((2, 5), np.int64) for name in IDS}
    with pytest.raises(UserError, match=r"^adapter is None, and this model needs an adapter in every run: .*base\.$"):
        session.run(inputs, adapter=None)
    session.load("one", adapter_file(exported))
    with_base = AdapterSession(make_export(swappable="base").model)
    with_base.load("one", adapter_file(make_export(swappable="base")))
    for scale in (1.0, 0.5):
        expected = with_base.run(inputs, adapter="one", scale=scale)["logits"]
        np.testing.assert_array_equal(session.run(inputs, adapter="one", scale=scale)["logits"], expected)
    with pytest.raises(ValueError, match=r"Required inputs .*lora_A.weight.* are missing"):
        create_session(exported.model).run(None, inputs)

    folder = Path(shutil.copytree(exported.folder, tmp_path / "alone", ignore=lambda *_: ["loratrf.onnx_adapter"]))
    with pytest.raises(UserError, match="needs an adapter in every run"):
        deployments("x", folder / "model.onnx", {}, Setting(library=False))
    names = [one.name for one in deployments("x", exported.model, {}, Setting(library=False))]
    assert names == ["x, adapter loratrf"]
    (folder / "loratrf.json").unlink()
    with pytest.raises(UserError, match=r"has no loratrf\.json beside it"):
        check_parity(folder / "model.onnx", exported.adapter, exported.base)


def test_onnx_runtime_warns_of_defaults_alone(make_export: Callable, capfd: pytest.CaptureFixture) -> None:
    """Of each, in a session of one's own; not below severity 3, and not where there are none."""
    code = (
        "import onnxruntime, sys; options = onnxruntime.SessionOptions();"
        "options.log_severity_level = int(sys.argv[2]); onnxruntime.InferenceSession(sys.argv[1], options)"
    )
    said = {}
    for default, severity in (("base", "2"), ("base", "3"), ("required", "2")):
        command = [sys.executable, "-c", code, str(make_export(swappable=default).model), severity]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said[default, severity] = done.stderr.count("appears in graph inputs and will not be treated as constant")
    capfd.readouterr()
    create_session(make_export(swappable="base").model)
    assert capfd.readouterr().err == ""
    weights = read_adapter_file(adapter_file(make_export(swappable="base"))).values
    assert said == {("base", "2"): len(weights), ("base", "3"): 0, ("required", "2"): 0}


def test_a_required_adapter_is_for_encoders(make_llm: Callable, refused: Callable, tmp_path: Path) -> None:
    base, adapter = make_llm()
    command = ["--adapter", adapter, "--base-model", base, "--swappable", "required"]
    assert "is for encoders" in refused(tmp_path / "out" / "model.onnx", *command)


def test_weights_of_equal_values_stay_inputs_of_their_own(make_tiny: Callable, tmp_path: Path) -> None:
    base, original = make_tiny(kind="loratrf")
    fresh = Path(shutil.copytree(original, tmp_path / "fresh"))
    weights = fresh / "adapter_model.safetensors"
    tensors = load_file(weights)
    # As PEFT initialises them: every B and D zero. And one A for all, which an exporter may share.
    first = next(value for name, value in tensors.items() if name.endswith("lora_A.weight"))
    for name in tensors:
        if name.endswith(("lora_B.weight", "trf_D.weight", "classifier.bias")):
            tensors[name] = np.zeros_like(tensors[name])
        elif name.endswith("lora_A.weight"):
            tensors[name] = first.copy()
    save_file(tensors, weights)
    model = tmp_path / "out" / "model.onnx"
    export_adapter(fresh, model, ExportOptions(base_model=base, mode="separate", swappable="adapter", check=False))
    graph = onnx.load(model, load_external_data=False).graph
    inputs = {value.name for value in graph.input} - set(IDS)
    assert len(inputs) == 4 * 5 + 2
    assert inputs == set(read_adapter_file(model.with_name("fresh.onnx_adapter")).values)
    assert inputs <= {value.name for value in graph.initializer}
    used = {name for node in graph.node for name in node.input}
    assert inputs <= used
    # A trained adapter must reach every one of these inputs.
    assert_proven(Exported(base, fresh, model), original, no_adapter="skipped")


def test_a_base_without_a_head_keeps_the_adapters(make_tiny: Callable, tmp_path: Path) -> None:
    base, adapter = make_tiny(kind="loratrf")
    headless = Path(shutil.copytree(base, tmp_path / "headless"))
    edit_tensors(
        headless / "model.safetensors",
        lambda tensors: {name: value for name, value in tensors.items() if not name.startswith("classifier")},
    )
    model = tmp_path / "out" / "model.onnx"
    result = export_adapter(
        adapter, model, ExportOptions(base_model=headless, mode="separate", swappable="base", check=False)
    )
    defaults = {weight.name: weight.default for weight in result.manifest.swappable.weights}
    assert {name for name, default in defaults.items() if default == "adapter"} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert_proven(Exported(headless, adapter, model))


def test_parity_notices_a_default_that_is_not_the_base(make_export: Callable, tmp_path: Path) -> None:
    exported = make_export(swappable="adapter")
    folder = Path(shutil.copytree(exported.model.parent, tmp_path / "lying"))
    swappable = read_json(folder / "loratrf.json")["swappable"]
    edit_json(folder / "loratrf.json", swappable=swappable | {"default": "base"})
    report = check_parity(folder / "model.onnx", exported.adapter, exported.base)
    assert {check.variant for check in report.checks if check.status == "failed"} == {"no adapter"}


def test_onnx_runtimes_own_loader_takes_the_file(make_export: Callable) -> None:
    exported = make_export(swappable="base")
    plain = make_export()
    session = create_session(exported.model)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(adapter_file(exported)))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    expected = create_session(plain.model).run(None, IDS)[0]
    np.testing.assert_allclose(session.run(None, IDS, options)[0], expected, atol=1e-6)
    assert np.abs(session.run(None, IDS)[0] - expected).max() > 1e-2


@pytest.mark.parametrize("size", ["end", "half", "start"])
def test_truncated_file(make_export: Callable, tmp_path: Path, size: str) -> None:
    raw = adapter_file(make_export(swappable="base")).read_bytes()
    file = tmp_path / "short.onnx_adapter"
    file.write_bytes(raw[: {"end": len(raw) - 1, "half": len(raw) // 2, "start": 3}[size]])
    with pytest.raises(UserError, match="truncated"):
        read_adapter_file(file)


def test_damaged_bytes_are_refused_and_never_read_out_of_bounds(
    make_export: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = bytearray(adapter_file(make_export(swappable="base")).read_bytes())
    file = tmp_path / "damaged.onnx_adapter"
    rng = np.random.default_rng(0)
    places = rng.integers(0, len(raw), 60)
    for place in places:
        damaged = raw.copy()
        damaged[place] ^= 0x41
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|truncated|no block"):
            read_adapter_file(file)
    # Somebody who wants to harm gets the checksum right.
    right = read_adapter_file(adapter_file(make_export(swappable="base")))
    monkeypatch.setattr("zlib.crc32", lambda content: right.crc32)
    # Past the weights' values lie the tables: every byte of some of them, then any.
    refused = 0
    for place in [*range(0, 64), *rng.integers(0, len(raw), 300)]:
        for value in (0x00, 0xFF):
            damaged = raw.copy()
            damaged[place] = value
            file.write_bytes(damaged)
            try:
                values = read_adapter_file(file).values
            except UserError:
                refused += 1
            else:
                assert all(value.size * value.itemsize <= len(raw) for value in values.values())
    assert refused > 30


def copied(source: Path, target: Path, **config: object) -> Path:
    folder = Path(shutil.copytree(source, target))
    edit_json(folder / "adapter_config.json", **config)
    return folder


def test_what_does_not_fit_is_refused_by_name(
    make_export: Callable, make_tiny: Callable, refused: Callable[..., str], tmp_path: Path
) -> None:
    loratrf = make_export(swappable="base")
    lora = make_export(kind="lora", swappable="base", target_modules=["query"])

    def assert_refused(adapter: Path, onto: Path, *words: str, options: tuple[object, ...] = ()) -> None:
        message = refused(tmp_path / "out" / "other.onnx_adapter", "--adapter", adapter, "--onto", onto, *options)
        assert all(word in message for word in words), message

    query, value = (f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value"))
    assert_refused(loratrf.adapter, lora.model, f"no filter at {query}", f"no low-rank half at {value}")
    assert_refused(make_tiny(kind="loratrf", filter_input="base")[1], loratrf.model, 'filter_input "base"')
    assert_refused(make_tiny(kind="lora", bias="lora_only")[1], loratrf.model, "biases", "--swappable")
    assert_refused(make_tiny(kind="lora", lora_bias=True)[1], loratrf.model, "lora_bias")
    tokens = make_tiny(kind="lora", trainable_token_indices={"word_embeddings": [1, 2]})[1]
    assert_refused(tokens, loratrf.model, "trainable_token_indices")
    assert_refused(make_tiny(kind="lora", use_dora=True)[1], loratrf.model, "takes no such gains", query)
    headless = make_tiny(kind="lora", modules_to_save=None, task_type=None)[1]
    assert_refused(headless, loratrf.model, "classifier.weight", "brings none")
    assert_refused(make_tiny("bert", "token-classification", "lora")[1], loratrf.model, "token-classification")
    five = tiny.make_base(tmp_path / "five", num_labels=5)
    labels = tiny.make_adapter(five, tmp_path / "labels", kind="lora")
    assert_refused(labels, loratrf.model, "their weights differ")
    assert_refused(
        labels,
        loratrf.model,
        "classifier.weight is (3, 32) in the model, (5, 32)",
        options=("--base-model", loratrf.base),
    )
    wide = tiny.make_adapter(
        tiny.make_base(tmp_path / "wide", hidden_size=16), tmp_path / "w", kind="lora", target_modules=["query"]
    )
    assert_refused(
        wide, loratrf.model, f"{query} has 32 features in the model, 16", options=("--base-model", loratrf.base)
    )
    nameless = copied(loratrf.adapter, tmp_path / "nameless", base_model_name_or_path="somebody/bert-large")
    assert_refused(nameless, loratrf.model, "somebody/bert-large", "--base-model")
    convert_adapter(nameless, loratrf.model, tmp_path / "named.onnx_adapter", base_model=loratrf.base)
    named = copied(loratrf.adapter, tmp_path / "named", base_model_name_or_path=f"elsewhere/{loratrf.base.name}")
    assert convert_adapter(named, loratrf.model, tmp_path / "named.onnx_adapter").base_by == "name"
    plain = make_export()
    assert_refused(plain.adapter, plain.model, "--swappable base")
    assert_refused(plain.adapter, tmp_path / "nowhere.onnx", "No model at")
    assert_refused(plain.adapter, loratrf.model, "--mode", options=("--mode", "merged"))
    changed = Path(shutil.copytree(loratrf.model.parent, tmp_path / "changed"))
    (changed / "model.onnx").write_bytes((changed / "model.onnx").read_bytes() + b"\x00")
    assert_refused(plain.adapter, changed / "model.onnx", "changed or replaced")
    with pytest.raises(UserError, match="onnx_adapter"):
        convert_adapter(loratrf.adapter, loratrf.model, tmp_path / "model.onnx")


ATTENTION = "bert.encoder.layer.1.attention.self"
CONTRADICTIONS = {
    "less in the file": (
        {},
        f"{ATTENTION}.value",
        f"target_modules covers {ATTENTION}.value, but the file holds no low",
    ),
    "half of a layer": (
        {},
        f"{ATTENTION}.value.trf",
        f"covers {ATTENTION}.value, but the file holds no filter weights",
    ),
    "narrowed": ({"target_modules": ["query"]}, "", f"low-rank weights for {ATTENTION}.value, which target_modules"),
    "narrowed filters": (
        {"filter_target_modules": ["query"]},
        "",
        f"filter weights for {ATTENTION}.value, which filter_",
    ),
    "other layers": ({"layers_to_transform": [0]}, "", f"low-rank weights for {ATTENTION}.query, which target_modules"),
    "excluded": ({"exclude_modules": ".*value"}, "", f"low-rank weights for {ATTENTION}.value, which target_modules"),
    # The model adapts no such layer: what it lists of its base tells.
    "widened": ({"target_modules": ["query", "value", "key"]}, "", f"target_modules covers {ATTENTION}.key, but the"),
    "more saved": (
        {"modules_to_save": ["classifier", "pooler"]},
        "",
        "modules_to_save covers bert.pooler.dense.weight",
    ),
}


@pytest.fixture(scope="module")
def mixed(make_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A model of --adapters, of one adapter."""
    base, adapter = make_tiny(kind="loratrf")
    out = tmp_path_factory.mktemp("mixed") / "model.onnx"
    return Exported(
        base, adapter, export_grouped({"a": adapter}, out, ExportOptions(base_model=base, check=False)).model
    )


@pytest.mark.parametrize("which", ["swappable", "mixed"])
@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_onto_holds_the_config_against_the_file(
    make_export: Callable, mixed: Exported, refused: Callable[..., str], tmp_path: Path, what: str, which: str
) -> None:
    exported = make_export(swappable="base") if which == "swappable" else mixed
    config, dropped, words = CONTRADICTIONS[what]
    adapter = copied(exported.adapter, tmp_path / "adapter", **config)
    if dropped:
        weights = adapter / "adapter_model.safetensors"
        edit_tensors(weights, lambda tensors: {key: value for key, value in tensors.items() if dropped not in key})
    message = refused(tmp_path / "out" / "a.onnx_adapter", "--adapter", adapter, "--onto", exported.model)
    assert words in message


def test_a_model_of_an_older_version_tells_of_its_own_layers_alone(
    make_export: Callable, refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    exported = make_export(swappable="base")
    old = Path(shutil.copytree(exported.model.parent, tmp_path / "old"))
    swappable = read_json(old / "loratrf.json")["swappable"]
    assert swappable.pop("base_parameters")["bert.pooler.dense.weight"] == [32, 32]
    edit_json(old / "loratrf.json", swappable=swappable)
    command = ["--onto", old / "model.onnx", "--adapter"]
    narrowed = copied(exported.adapter, tmp_path / "narrowed", target_modules=["query"])
    assert f"{ATTENTION}.value, which" in refused(tmp_path / "n.onnx_adapter", *command, narrowed)
    widened = copied(exported.adapter, tmp_path / "widened", target_modules=["query", "value", "key"])
    out = tmp_path / "w.onnx_adapter"
    assert main([str(part) for part in (*command, widened, "--out", out)]) == 0
    assert "held against the model's own layers alone" in capsys.readouterr().out
    assert not convert_adapter(widened, old / "model.onnx", out).base_listed


@pytest.mark.parametrize("which", ["swappable", "mixed"])
def test_check_proves_a_conversion_and_leaves_nothing_where_it_fails(
    make_export: Callable,
    make_tiny: Callable,
    mixed: Exported,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    which: str,
) -> None:
    exported = make_export(swappable="base") if which == "swappable" else mixed
    _, lora = make_tiny(kind="lora", r=9, seed=3, target_modules=["query"])
    out = tmp_path / "out" / "lora.onnx_adapter"
    command = [str(part) for part in ("--adapter", lora, "--onto", exported.model, "--out", out)]
    capsys.readouterr()
    assert main([*command, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "Parity holds (4 passed)" in shown
    assert "not checked" not in shown
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    written = out.read_bytes()
    # Half of what the adapter does: the model is right, what it is given is not.
    half = copied(lora, tmp_path / "half", lora_alpha=9)
    real = case.fit
    doubled = lambda adapter, *rest: {  # noqa: E731
        name: value * 2 if name.endswith("lora_B.weight") else value for name, value in real(adapter, *rest).items()
    }
    monkeypatch.setattr(case, "fit", doubled)
    command[1] = str(half)
    assert main([*command, "--check", "--json"]) == 1
    shown, error = capsys.readouterr()
    facts = json.loads(shown)
    assert (facts["file"], facts["parity"]["passed"]) == (None, False)
    assert error.startswith("error: ")
    assert "nothing was written" in error
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() == written
    assert main(command) == 0  # as it is without --check
    assert "not checked: add --check" in capsys.readouterr().out


def test_check_needs_the_base(make_export: Callable, refused: Callable[..., str], tmp_path: Path) -> None:
    exported = make_export(swappable="base")
    named = copied(exported.adapter, tmp_path / "named", base_model_name_or_path=f"elsewhere/{exported.base.name}")
    out = tmp_path / "out" / "named.onnx_adapter"
    assert "--base-model PATH" in refused(out, "--adapter", named, "--onto", exported.model, "--check")


def test_swappable_is_refused_where_it_can_not_be(make_tiny: Callable, tmp_path: Path, capsys) -> None:
    base, adapter = make_tiny(kind="loratrf")
    arguments = ["--adapter", str(adapter), "--base-model", str(base), "--out", str(tmp_path / "o" / "model.onnx")]
    assert main([*arguments, "--swappable", "base", "--mode", "merged"]) == 2
    assert "can't be swapped" in capsys.readouterr().err
    biased = make_tiny(kind="lora", bias="all")[1]
    with pytest.raises(UserError, match="biases"):
        export_adapter(
            biased, tmp_path / "o" / "model.onnx", ExportOptions(base_model=base, mode="separate", swappable="base")
        )
    assert not (tmp_path / "o").exists()


def test_a_value_over_float16_is_refused(make_export: Callable, tmp_path: Path) -> None:
    from loratrf_deploy.formats.fit import fit
    from loratrf_deploy.formats.manifest import read_swappable

    exported = make_export("roberta", "text-classification", "loratrf", swappable="base", dtype="float16")
    adapter, (manifest, swappable) = read_adapter(exported.adapter), read_swappable(exported.model)
    name, layer = next(iter(adapter.layers.items()))
    loud = dataclasses.replace(adapter, layers=adapter.layers | {name: dataclasses.replace(layer, scale=1e7)})
    with pytest.raises(UserError, match=rf"{name}.lora_B.weight exceeds float16"):
        fit(loud, swappable.weights, manifest.adapter.filter_input)


def test_several_adapters_are_converted_in_one_call_or_none(
    make_export: Callable, make_tiny: Callable, tmp_path: Path, capsys
) -> None:
    exported = make_export(swappable="base")
    _, lora = make_tiny(kind="lora", r=5, target_modules=["query"], layers_to_transform=[1])
    foreign = make_tiny("vit", "image-classification", "lora")[1]
    out = tmp_path / "out"
    command = ["--onto", str(exported.model), "--out", str(out), "--adapters", f"own one={exported.adapter}"]
    capsys.readouterr()
    assert main([*command, f"b={lora}", f"c={foreign}"]) == 2
    assert str(foreign) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*command, "../b=" + str(lora)]) == 2
    assert "--adapters has the name '../b'" in capsys.readouterr().err
    assert main([*command, f"b={lora}", "--check", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["adapters"]
    assert [(Path(one["file"]).name, one["layers"], one["parity"]["passed"]) for one in facts] == [
        ("own one.onnx_adapter", 4, True),
        ("b.onnx_adapter", 1, True),
    ]
    assert sorted(path.name for path in out.iterdir()) == ["b.onnx_adapter", "own one.onnx_adapter"]
    for name, adapter in (("own one", exported.adapter), ("b", lora)):
        alone = tmp_path / f"{name}.onnx_adapter"
        convert_adapter(adapter, exported.model, alone)
        assert (out / alone.name).read_bytes() == alone.read_bytes()


def test_onto_needs_neither_torch_nor_onnx(make_export: Callable, tmp_path: Path) -> None:
    exported = make_export(swappable="base")
    code = "import sys; from loratrf_deploy.cli.export import main; sys.exit(main())"
    out = tmp_path / "again.onnx_adapter"
    arguments = ["--adapter", exported.adapter, "--onto", exported.model, "--out", out]
    result = run_python(code, *arguments, without=FRAMEWORKS)
    assert (result.returncode, result.stderr) == (0, "")
    assert "4 adapted of the model's 4" in result.stdout
    facts = json.loads(run_python(code, *arguments, "--json", without=FRAMEWORKS).stdout)
    counts = {"layers": 4, "model_layers": 4, "base_by": "hash", "base_listed": True}
    assert facts == {"file": str(out), "bytes": out.stat().st_size, **counts, "parity": None, "warnings": []}
    again, first = read_adapter_file(out), read_adapter_file(adapter_file(exported))
    assert all(np.array_equal(again.values[name], value) for name, value in first.values.items())
    assert again.origin == first.origin


def test_inspect_shows_what_swaps(make_export: Callable, make_tiny: Callable, tmp_path: Path) -> None:
    exported = make_export(swappable="base")
    folder = Path(shutil.copytree(exported.model.parent, tmp_path / "model"))
    (folder / "foreign.onnx_adapter").write_bytes(b"not an adapter")
    assert inspect_path(folder)["swappable"] == {
        "default": "base",
        "weights": 22,
        "gains": 0,
        "offsets": 0,
        "slots": {},
        "answers": {},
        "files": [adapter_file(exported).name],
        "other_files": ["foreign.onnx_adapter"],
    }
    _, lora = make_tiny(kind="lora", r=5, target_modules=["query"], layers_to_transform=[1])
    convert_adapter(lora, exported.model, folder / "lora.onnx_adapter")
    facts = inspect_path(folder / "lora.onnx_adapter")
    assert facts["adapter"]["peft_type"] == "LORA"
    ranks = {layer["module"]: (layer["rank"], layer["filter_rank"]) for layer in facts["layers"]}
    assert ranks.pop("bert.encoder.layer.1.attention.self.query") == (5, 0)
    assert set(ranks.values()) == {(0, 0)}
    assert facts["saved"] == {"classifier.weight": 96, "classifier.bias": 3}
    from loratrf_deploy.cli.inspect import main as inspect_main

    assert inspect_main([str(folder)]) == 0
    assert inspect_main([str(folder / "lora.onnx_adapter")]) == 0
