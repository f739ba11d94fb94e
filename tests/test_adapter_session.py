"""AdapterSession: the traps of adapters in ONNX Runtime, each by name; memory limits; threads."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest

from conftest import Exported
from loratrf_deploy import AdapterSession, UserError, create_session
from loratrf_deploy.export.onto import convert_adapter
from loratrf_deploy.formats.adapter_file import read_adapter_file, write_adapter_file
from shared import FRAMEWORKS, IDS, ask_while, run_python

SMALL = {"kind": "lora", "r": 2, "seed": 4, "lora_alpha": 9}


class Zoo(NamedTuple):
    """A swappable model with two adapter files, and what each gives on IDS, from models of their own."""

    exported: Exported
    files: dict[str, Path]
    expected: dict[str | None, np.ndarray]


@pytest.fixture(scope="session")
def zoo(make_export: Callable, make_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    exported, folder = make_export(swappable="base"), tmp_path_factory.mktemp("zoo")
    files = {
        "ours": exported.model.with_name(f"{exported.adapter.name}.onnx_adapter"),
        "small": folder / "s.onnx_adapter",
    }
    convert_adapter(make_tiny(**SMALL)[1], exported.model, files["small"])
    own = {"ours": make_export(mode="merged"), "small": make_export(mode="merged", **SMALL), None: exported}
    return Zoo(exported, files, {name: create_session(made.model).run(None, IDS)[0] for name, made in own.items()})


def opened(zoo: Zoo, **options) -> AdapterSession:
    session = AdapterSession(zoo.exported.model, **options)
    for name, file in zoo.files.items():
        session.load(name, file)
    return session


def assert_is(session: AdapterSession, zoo: Zoo, name: str | None) -> None:
    np.testing.assert_allclose(session.run(IDS, adapter=name)["logits"], zoo.expected[name], atol=2e-6)


@pytest.mark.parametrize("library", [True, False])
def test_each_run_uses_the_adapter_that_it_names(zoo: Zoo, library: bool, capfd: pytest.CaptureFixture) -> None:
    session = opened(zoo, library=library)
    gaps = [np.abs(zoo.expected[a] - zoo.expected[b]).max() for a, b in (("ours", "small"), ("ours", None))]
    assert min(gaps) > 1e-2
    for name in ("ours", "small", None, "ours", None, "small", "small"):
        assert_is(session, zoo, name)
    assert session.default == "base"
    assert list(session.adapters) == ["ours", "small"]
    assert capfd.readouterr() == ("", "")  # ONNX Runtime warns of every run-time weight


def test_trap_python_run_rejects_inputs_without_a_default(zoo: Zoo) -> None:
    session = create_session(zoo.exported.model)
    weights = {value.name for value in session.get_overridable_initializers()}
    assert weights == set(read_adapter_file(zoo.files["ours"]).values)
    assert {value.name for value in session.get_inputs()} == set(IDS)
    assert session.run(None, IDS)[0].shape == (2, 3)


def test_trap_io_binding_ignores_active_adapters(zoo: Zoo) -> None:
    # What ONNX Runtime does, with a warning at most: the base's answer.
    plain = create_session(zoo.exported.model)
    active, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    active.Load(str(zoo.files["ours"]))
    options.add_active_adapter(active)
    options.log_severity_level = 3
    binding = plain.io_binding()
    for name, value in IDS.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("logits")
    plain.run_with_iobinding(binding, options)
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], zoo.expected[None], atol=2e-6)
    # AdapterSession binds too, and binds the adapter.
    assert_is(opened(zoo), zoo, "ours")


def test_trap_two_adapters_of_one_name(zoo: Zoo) -> None:
    session = opened(zoo)
    with pytest.raises(UserError, match=r"'ours' is loaded already, from .*replace=True"):
        session.load("ours", zoo.files["small"])
    assert_is(session, zoo, "ours")
    session.load("ours", zoo.files["small"], replace=True)
    np.testing.assert_array_equal(
        session.run(IDS, adapter="ours")["logits"], session.run(IDS, adapter="small")["logits"]
    )


def rewritten(zoo: Zoo, path: Path, change: Callable[[dict[str, np.ndarray], dict], None]) -> Path:
    file = read_adapter_file(zoo.files["ours"])
    values, facts = dict(file.values), {}
    change(values, facts)
    write_adapter_file(path, values, dataclasses.replace(file.origin, **facts))
    return path


NAME = "bert.encoder.layer.1.attention.self.value.lora_B.weight"


def test_trap_half_the_layers(zoo: Zoo, tmp_path: Path) -> None:
    def halve(values: dict, facts: dict) -> None:
        for name in [name for name in values if ".layer.1." in name]:
            del values[name]

    with pytest.raises(
        UserError, match=r"lacks bert\.encoder\.layer\.1\.attention\.self\.query\.lora_A\.weight.*5 more"
    ):
        opened(zoo).load("half", rewritten(zoo, tmp_path / "a.onnx_adapter", halve))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda values, facts: values.update({NAME: values[NAME][:, :2].copy()}),
            r"value\.lora_B.* is \(32, 2\), expected",
        ),
        (lambda values, facts: values.update({NAME: values[NAME].astype(np.float16)}), "is float16, expected float32"),
        (lambda values, facts: values.update({NAME: values[NAME][0].copy()}), r"is \(4,\), expected \(32, 4\)"),
        (lambda values, facts: values.update({"other": values[NAME]}), "takes no other"),
        (
            lambda values, facts: values.update({"classifier.bias": np.zeros(5, np.float32)}),
            r"is \(5,\), expected \(3\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(zoo: Zoo, tmp_path: Path, change: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(zoo).load("bad", rewritten(zoo, tmp_path / "a.onnx_adapter", change))


def test_trap_versions_are_not_checked(zoo: Zoo, tmp_path: Path) -> None:
    session = opened(zoo)
    base = rewritten(zoo, tmp_path / "b.onnx_adapter", lambda values, facts: facts.update(base_sha256="0" * 64))
    with pytest.raises(UserError, match="made for another base model"):
        session.load("bad", base)
    graph = rewritten(zoo, tmp_path / "g.onnx_adapter", lambda values, facts: facts.update(model_sha256="0" * 64))
    with pytest.raises(UserError, match=r"made for another export.*--onto"):
        session.load("bad", graph)
    # A file that other tools wrote says nothing of what it fits, though ONNX Runtime would take it.
    foreign = onnxruntime.AdapterFormat.read_adapter(str(zoo.files["ours"]))
    foreign.export_adapter(str(tmp_path / "f.onnx_adapter"))
    with pytest.raises(UserError, match="no block at its end"):
        session.load("bad", tmp_path / "f.onnx_adapter")
    assert list(session.adapters) == ["ours", "small"]


def test_truncated_missing_and_foreign_files(zoo: Zoo, tmp_path: Path) -> None:
    session = opened(zoo)
    raw = zoo.files["ours"].read_bytes()
    (tmp_path / "short.onnx_adapter").write_bytes(raw[:-100])
    with pytest.raises(UserError, match="truncated"):
        session.load("bad", tmp_path / "short.onnx_adapter")
    with pytest.raises(UserError, match="Can't read"):
        session.load("bad", tmp_path / "nowhere.onnx_adapter")
    with pytest.raises(UserError, match="truncated, or loratrf-export didn't write it"):
        session.load("bad", zoo.exported.adapter / "adapter_model.safetensors")


def test_adapter_of_another_export(zoo: Zoo, make_export: Callable) -> None:
    other = make_export(swappable="adapter")
    session = AdapterSession(other.model)
    assert session.default == "adapter"
    with pytest.raises(UserError, match="another export"):
        session.load("bad", zoo.files["ours"])


def test_unknown_names_list_the_known(zoo: Zoo) -> None:
    session = opened(zoo)
    for call in (lambda: session.run(IDS, adapter="outs"), lambda: session.unload("outs")):
        with pytest.raises(UserError, match=r"No adapter 'outs' is loaded\. Loaded: 'ours', 'small'"):
            call()
    session.unload("small")
    with pytest.raises(UserError, match=r"'small' is loaded\. Loaded: 'ours'"):
        session.run(IDS, adapter="small")
    with pytest.raises(TypeError):
        session.run(IDS)  # nobody gets the base by forgetting


def test_inputs_that_the_model_does_not_take(zoo: Zoo) -> None:
    session = opened(zoo)
    for inputs, message in [
        ({}, "the model takes input_ids"),
        (IDS | {"pixel_values": np.zeros(3)}, "pixel_values"),
        (IDS | {"input_ids": IDS["input_ids"].astype(np.float32)}, r"input_ids \(2, 6\) float32"),
    ]:
        with pytest.raises(UserError, match=message):
            session.run(inputs, adapter="ours")
    with pytest.raises(UserError, match="no output scores"):
        session.run(IDS, adapter="ours", outputs=["scores"])
    with pytest.raises(UserError, match="finite"):
        session.run(IDS, adapter="ours", scale=float("nan"))
    assert_is(session, zoo, "ours")  # a failed run leaves nothing behind


def test_scale(zoo: Zoo, make_tiny: Callable, tmp_path: Path) -> None:
    session = opened(zoo)
    # The same weights, trained with half the alpha and half the gamma.
    _, half = make_tiny(kind="loratrf", lora_alpha=4, filter_gamma=0.5)
    convert_adapter(half, zoo.exported.model, tmp_path / "half.onnx_adapter")
    session.load("half", tmp_path / "half.onnx_adapter")
    expected = session.run(IDS, adapter="half")["logits"]
    np.testing.assert_allclose(session.run(IDS, adapter="ours", scale=0.5)["logits"], expected, atol=1e-6)
    assert np.abs(expected - zoo.expected["ours"]).max() > 1e-3

    def mute(values: dict, facts: dict) -> None:
        for name in values:
            if name.endswith(("lora_B.weight", "trf_D.weight")):
                values[name] = np.zeros_like(values[name])

    session.load("zero", rewritten(zoo, tmp_path / "zero.onnx_adapter", mute))
    zero = session.run(IDS, adapter="ours", scale=0)["logits"]
    np.testing.assert_array_equal(zero, session.run(IDS, adapter="zero")["logits"])
    assert_is(session, zoo, "ours")
    with pytest.raises(UserError, match="nothing to scale"):
        session.run(IDS, adapter=None, scale=0.5)


def test_on_a_device_weights_are_copied_when_loaded_and_never_in_a_run(zoo: Zoo, pretended_device: list) -> None:
    session = opened(zoo)
    weights = read_adapter_file(zoo.files["ours"]).values
    assert len(pretended_device) == 2 * len(weights)
    pretended_device.clear()
    half = session.run(IDS, adapter="ours", scale=0.5)["logits"]
    assert len(pretended_device) == sum(name.endswith(("lora_B.weight", "trf_D.weight")) for name in weights)
    pretended_device.clear()
    for name in ("ours", "small", None, "ours"):
        assert_is(session, zoo, name)
    assert pretended_device == []
    session.load("ours", zoo.files["small"], replace=True)
    assert np.abs(session.run(IDS, adapter="ours")["logits"] - zoo.expected["small"]).max() < 2e-6
    session.unload("ours")
    assert_is(session, zoo, "small")
    assert np.abs(half - zoo.expected["ours"]).max() > 1e-3


def test_adapters_over_the_limit_are_put_aside_and_read_again(zoo: Zoo, tmp_path: Path) -> None:
    files = {name: Path(shutil.copy(file, tmp_path / file.name)) for name, file in zoo.files.items()}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    session = AdapterSession(zoo.exported.model, max_bytes=max(sizes.values()))
    for name, file in files.items():
        session.load(name, file)
    assert {name: info.resident for name, info in session.adapters.items()} == {"ours": False, "small": True}
    assert_is(session, zoo, "ours")
    assert {name: info.resident for name, info in session.adapters.items()} == {"small": False, "ours": True}
    assert_is(session, zoo, "small")
    shutil.copy(files["small"], files["ours"])
    with pytest.raises(UserError, match=r"'ours' was put aside.*has changed"):
        session.run(IDS, adapter="ours")
    with pytest.raises(UserError, match="more than max_bytes"):
        AdapterSession(zoo.exported.model, max_bytes=100).load("ours", zoo.files["ours"])
    both = AdapterSession(zoo.exported.model, max_bytes=sum(sizes.values()))
    for name, file in zoo.files.items():
        both.load(name, file)
    assert all(info.resident for info in both.adapters.values())


def test_threads_never_get_another_adapters_answer_while_adapters_come_and_go(zoo: Zoo) -> None:
    session = opened(zoo, max_bytes=20_000)  # room for one: adapters are put aside all the time

    def churn(turn: int) -> None:
        session.load("passing", zoo.files["small"], replace=True)
        session.unload("passing")

    def ask(number: int) -> None:
        for turn in range(25):
            assert_is(session, zoo, ("ours", "small", None)[(number + turn) % 3])

    ask_while(churn, ask)


def test_unload_while_a_run_uses_it(zoo: Zoo) -> None:
    session = opened(zoo)
    weights = session._residents.resident("ours")  # what a run holds once it has begun
    session.unload("ours")
    np.testing.assert_allclose(weights.run(IDS, ["logits"])["logits"], zoo.expected["ours"], atol=2e-6)


def test_a_model_that_takes_no_adapters(make_export: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--swappable base"):
        AdapterSession(make_export().model)
    with pytest.raises(UserError, match="No model at"):
        AdapterSession(tmp_path / "model.onnx")


def test_running_needs_neither_torch_nor_onnx(zoo: Zoo) -> None:
    code = """import sys, numpy as np
from loratrf_deploy import AdapterSession
session = AdapterSession(sys.argv[1])
session.load('a', sys.argv[2])
ids = np.ones((1, 4), np.int64)
print(session.run(dict(input_ids=ids, attention_mask=ids, token_type_ids=ids * 0), adapter='a')['logits'].shape)"""
    result = run_python(code, zoo.exported.model, zoo.files["ours"], without=FRAMEWORKS)
    assert (result.returncode, result.stdout, result.stderr) == (0, "(1, 3)\n", "")
