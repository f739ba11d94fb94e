"""Bytes that changed after the export, values that are no numbers, and adapters that do nothing: none goes unsaid."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Exported
from loratrf_deploy import AdapterSession, GenerationSession, UserError
from loratrf_deploy.cli import export as export_cli
from loratrf_deploy.cli import inspect as inspect_cli
from loratrf_deploy.export import convert_adapter
from loratrf_deploy.formats import manifest as manifest_module
from loratrf_deploy.formats.adapter_file import Origin, read_adapter_file, write_adapter_file
from loratrf_deploy.formats.inspection import inspect_path
from loratrf_deploy.formats.manifest import AdapterId, file_sha256, sampled_sha256
from loratrf_deploy.parity import check_grouped_parity, check_parity
from shared import IDS, edit_json, edit_tensors, read_json

# Values of an .onnx_adapter.


def adapter_file(path: Path, dtype: Any) -> Path:
    values = {f"layer.lora_{part}.weight": np.full((3, 5), 1 + number, dtype) for number, part in enumerate("AB")}
    write_adapter_file(path, values, Origin(AdapterId("a", "0", "LORA"), None, "0"))
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_checksummed_file_with_no_number_is_refused(tmp_path: Path, dtype: Any, value: float) -> None:
    file = adapter_file(tmp_path / "a.onnx_adapter", dtype)
    size, raw = np.dtype(dtype).itemsize, bytearray(file.read_bytes())
    place = raw.index(np.full(15, 2, dtype).tobytes()) + 14 * size
    end = len(raw) - struct.calcsize("<QI8s")

    def holding(number: Any) -> Path:
        raw[place : place + size] = np.array(number, dtype).tobytes()
        raw[end + 8 : end + 12] = struct.pack("<I", zlib.crc32(raw[:end]))
        file.write_bytes(raw)
        return file

    largest = np.finfo(dtype).max
    assert read_adapter_file(holding(-largest)).values["layer.lora_B.weight"][2, 4] == -largest
    with pytest.raises(UserError, match=r"NaN or infinite values in layer\.lora_B\.weight\)"):
        read_adapter_file(holding(value))


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (1e39, r"scale is 1e\+39, expected a finite number that float32 holds"),
        (-1e39, r"scale is -1e\+39"),
        (float("inf"), "scale is inf"),
        (float("nan"), "scale is nan"),
        (10**400, "scale is 1000"),
        ("1", "scale is '1'"),
        (3e38, r"scale is 3e\+38, with which .*lora_B\.weight exceeds float32"),
    ],
)
def test_a_scale_that_weights_do_not_survive(make_export: Callable, tmp_path: Path, scale: Any, words: str) -> None:
    exported = make_export(swappable="base")
    file = read_adapter_file(exported.model.with_name(f"{exported.adapter.name}.onnx_adapter"))
    loud = {name: value * 10 if name.endswith("lora_B.weight") else value for name, value in file.values.items()}
    write_adapter_file(tmp_path / "a.onnx_adapter", loud, file.origin)
    session = AdapterSession(exported.model)
    session.load("a", tmp_path / "a.onnx_adapter")
    with pytest.raises(UserError, match=words):
        session.run(IDS, adapter="a", scale=scale)
    assert np.isfinite(session.run(IDS, adapter="a", scale=np.float32(0.5))["logits"]).all()


def test_a_scale_beyond_float16(make_export: Callable, tmp_path: Path) -> None:
    exported = make_export("roberta", "text-classification", "loratrf", swappable="base", dtype="float16")
    session = AdapterSession(exported.model)
    session.load("a", exported.model.with_name(f"{exported.adapter.name}.onnx_adapter"))
    inputs = {name: value for name, value in IDS.items() if name in session._inputs}
    with pytest.raises(UserError, match="exceeds float16"):
        session.run(inputs, adapter="a", scale=1e7)
    # A scale over float16 whose products are not.
    file = read_adapter_file(exported.model.with_name(f"{exported.adapter.name}.onnx_adapter"))
    scales = ("lora_B.weight", "trf_D.weight")
    quiet = {
        name: (value.astype(np.float32) / 131072).astype(np.float16) if name.endswith(scales) else value
        for name, value in file.values.items()
    }
    write_adapter_file(tmp_path / "quiet.onnx_adapter", quiet, file.origin)
    session.load("quiet", tmp_path / "quiet.onnx_adapter")
    expected = session.run(inputs, adapter="a")["logits"].astype(np.float32)
    scaled = session.run(inputs, adapter="quiet", scale=131072)["logits"].astype(np.float32)
    assert np.abs(scaled - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(("scale", "words"), [(1e39, r"scale is 1e\+39"), (3e38, "exceeds float32")])
def test_a_scale_that_a_language_models_weights_do_not_survive(exported: Callable, scale: float, words: str) -> None:
    folder = exported("loratrf", swappable="base").parent
    session = GenerationSession(folder)
    session.load("a", next(folder.glob("*.onnx_adapter")))
    with pytest.raises(UserError, match=words):
        session.generate(["x"], adapter="a", scale=scale)


# Files of weights.


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model.parent, folder)) / model.name


def change(path: Path, start: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)


@pytest.fixture(scope="module")
def another(make_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx.data of the same base, exported from an adapter of the same sizes and other values."""
    from loratrf_deploy.export import ExportOptions, export_adapter

    base, adapter = make_tiny(seed=21)
    out = tmp_path_factory.mktemp("another") / "model.onnx"
    export_adapter(adapter, out, ExportOptions(base_model=base, swappable="adapter", check=False))
    return out.with_name("model.onnx.data")


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "cut off": (lambda data, other: data.write_bytes(data.read_bytes()[:-1]), r"it has \d+ bytes, expected \d+"),
    "another export's": (lambda data, other: shutil.copy(other, data), "is not the file that loratrf.json describes"),
    "one byte": (lambda data, other: change(data, 5000, bytes([data.read_bytes()[5000] ^ 1])), "its (bytes|sha256)"),
    "missing": (lambda data, other: data.unlink(), r"model\.onnx\.data is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_other_weights_run_nowhere(
    make_export: Callable, another: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    exported = make_export(swappable="adapter")
    spoil, words = DAMAGE[damage]
    model = copy_of(exported.model, tmp_path / "copy")
    assert another.stat().st_size == exported.model.with_name("model.onnx.data").stat().st_size
    AdapterSession(model)
    spoil(model.with_name("model.onnx.data"), another)
    with pytest.raises(UserError, match=words):
        AdapterSession(model)
    with pytest.raises(UserError, match=words):
        check_parity(model, exported.adapter, exported.base)
    assert any("model.onnx.data" in warning for warning in inspect_path(model)["warnings"])
    capsys.readouterr()
    assert inspect_cli.main([str(model), "--verify"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {model.with_name('model.onnx.data')} ")
    # What converts adapters reads no weights.
    convert_adapter(exported.adapter, model, tmp_path / "a.onnx_adapter")


def test_a_model_with_a_fixed_adapter_is_held_against_its_hashes_by_parity(
    make_export: Callable, tmp_path: Path
) -> None:
    exported = make_export()
    model = copy_of(exported.model, tmp_path / "copy")
    change(model.with_name("model.onnx.data"), 5000, b"\xff")
    with pytest.raises(UserError, match="its sha256 is"):
        check_parity(model, exported.adapter, exported.base)
    # Who makes another model of the graph is not told that the export was damaged.
    with model.open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(UserError, match=r"model\.onnx is not a readable|refuses"):
        check_parity(model, exported.adapter, exported.base)


def test_what_samples_miss_parity_and_verify_find(
    make_export: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The files of these tests are too small for samples to miss anything."""
    exported = make_export(swappable="base")
    model = copy_of(exported.model, tmp_path / "copy")
    recorded = read_json(model.with_name("loratrf.json"))["model"]["files"]["model.onnx.data"]["sampled"]
    assert inspect_cli.main([str(model), "--verify"]) == 0
    assert "every byte is as it was exported" in capsys.readouterr().out
    change(model.with_name("model.onnx.data"), 5000, b"\xff\xff")
    monkeypatch.setattr(manifest_module, "sampled_sha256", lambda path: recorded)
    AdapterSession(model)
    assert not [warning for warning in inspect_path(model)["warnings"] if "data" in warning]
    with pytest.raises(UserError, match="its sha256 is"):
        check_parity(model, exported.adapter, exported.base)
    assert inspect_cli.main([str(model), "--verify"]) == 2
    assert "its sha256 is" in capsys.readouterr().err


def test_samples(tmp_path: Path) -> None:
    """A stretch longer than a 1024th is always met, at both ends too; a byte between two pieces is not."""
    file, size = tmp_path / "weights", 5_000_000
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8)

    def sampled(*places: slice) -> str:
        changed = content.copy()
        for place in places:
            changed[place] ^= 1
        file.write_bytes(changed.tobytes())
        return sampled_sha256(file)

    right = sampled()
    assert sampled() == right
    step = size // 1024 + 1
    for start in (0, 1, 1025, 3333, size // 2, size - step):
        assert sampled(slice(start, start + step)) != right
    assert sampled(slice(0, 1)) != right
    assert sampled(slice(size - 1, size)) != right
    assert sampled(slice(2000, 2001)) == right
    file.write_bytes(content[:-1].tobytes())
    assert sampled_sha256(file) != right
    for small in (0, 1, 1024, 1025, 300_000):
        file.write_bytes(content[:small].tobytes())
        digests = {sampled_sha256(file)}
        for place in {0, small // 3, small - 1} if small else ():
            changed = content[:small].copy()
            changed[place] ^= 1
            file.write_bytes(changed.tobytes())
            digests.add(sampled_sha256(file))
        assert len(digests) == 1 + (len({0, small // 3, small - 1}) if small else 0)


@pytest.mark.parametrize("mode", [{"swappable": "base"}, {"mode": "separate"}], ids=["swappable", "fixed"])
@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx.adapter"])
def test_other_weights_of_a_language_model(exported: Callable, tmp_path: Path, mode: dict, name: str) -> None:
    model = copy_of(exported("loratrf", **mode), tmp_path / "copy")
    GenerationSession(model.parent)
    data = model.with_name(name)
    change(data, data.stat().st_size // 2, b"\x12\x34\x56\x78")
    with pytest.raises(UserError, match=rf"{name} is not the file that loratrf\.json describes"):
        GenerationSession(model.parent)


def test_another_graph_of_a_language_model(exported: Callable, tmp_path: Path) -> None:
    for mode in ({"swappable": "base"}, {"mode": "separate"}):
        model = copy_of(exported("loratrf", **mode), tmp_path / next(iter(mode)))
        with model.open("ab") as file:
            file.write(b"\x5a\x00")  # an unknown field, which nobody who reads the model minds
        with pytest.raises(UserError, match=r"model\.onnx is not the file that loratrf\.json describes"):
            GenerationSession(model.parent)


def test_an_older_manifest_knows_no_hashes(
    make_export: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    exported = make_export(swappable="base")
    model = copy_of(exported.model, tmp_path / "copy")
    digest = read_json(model.with_name("loratrf.json"))["model"]["sha256"]
    edit_json(model.with_name("loratrf.json"), model={"sha256": digest})
    AdapterSession(model)
    facts = inspect_path(model)
    assert facts["bytes"] == inspect_path(exported.model)["bytes"]
    assert [warning[:22] for warning in facts["warnings"]] == ["parity was not checked"]
    capsys.readouterr()
    assert inspect_cli.main([str(model), "--verify"]) == 2
    assert "has no hashes of the weights" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "", ".", ".."])
def test_a_manifest_names_files_beside_it_alone(make_export: Callable, tmp_path: Path, name: str) -> None:
    model = copy_of(make_export(swappable="base").model, tmp_path / "copy")
    facts = read_json(model.with_name("loratrf.json"))["model"]
    (own,) = facts["files"].values()
    edit_json(model.with_name("loratrf.json"), model=facts | {"files": {name: own}})
    with pytest.raises(UserError, match="is damaged: model is missing or not what loratrf-export writes"):
        AdapterSession(model)


def test_verify_is_for_models(make_export: Callable) -> None:
    exported = make_export(swappable="base")
    for path in (exported.adapter, exported.model.with_name(f"{exported.adapter.name}.onnx_adapter")):
        with pytest.raises(UserError, match="--verify holds an exported model's files"):
            inspect_path(path, verify=True)
    changed = exported.model
    assert inspect_path(changed, verify=True)["model"]["sha256"] == file_sha256(changed)


def test_verify_finds_another_graph(make_export: Callable, tmp_path: Path) -> None:
    model = copy_of(make_export().model, tmp_path / "copy")
    with model.open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(UserError, match=r"model\.onnx is not the file that loratrf\.json describes: its sha256"):
        inspect_path(model, verify=True)


# Adapters that do nothing.


def zeroed(source: Path, folder: Path, *endings: str) -> Path:
    copied = Path(shutil.copytree(source, folder))

    def zero(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            tensors[name] = np.zeros_like(tensors[name])

    edit_tensors(copied / "adapter_model.safetensors", zero)
    return copied


IDLE: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str | None]] = {
    # kind, config, what is zero, why it does nothing
    "alpha 0": ("lora", {"lora_alpha": 0}, (), "lora_alpha is 0"),
    "B": ("lora", {}, ("lora_B.weight",), "lora_B is zero"),
    "A": ("lora", {}, ("lora_A.weight",), "lora_A is zero"),
    "both halves": ("loratrf", {}, ("lora_B.weight", "trf_D.weight"), "lora_B is zero, trf_D is zero"),
    "alpha and gamma": ("loratrf", {"lora_alpha": 0, "filter_gamma": 0}, (), "lora_alpha is 0, filter_gamma is 0"),
    "tau": ("loratrf", {"lora_alpha": 0}, ("trf_tau",), "lora_alpha is 0, trf_tau is zero"),
    "one half": ("loratrf", {}, ("lora_B.weight",), None),
    "one layer": ("lora", {}, ("0.attention.self.query.lora_B.weight",), None),
    "a layer's alpha": ("lora", {"alpha_pattern": {"query": 0}}, (), None),
    "none": ("loratrf", {}, (), None),
}


@pytest.mark.parametrize("case", IDLE)
def test_an_adapter_that_does_nothing_is_said_to(
    make_tiny: Callable, tmp_path: Path, case: str, capsys: pytest.CaptureFixture
) -> None:
    kind, config, endings, why = IDLE[case]
    adapter = zeroed(make_tiny(kind=kind)[1], tmp_path / "adapter", *endings or ("nothing",))
    edit_json(adapter / "adapter_config.json", **config)
    said = f"this adapter changes no layer: {why}. Only what it brings whole can matter: classifier."
    assert inspect_path(adapter)["warnings"] == ([said] if why else [])
    capsys.readouterr()
    assert inspect_cli.main([str(adapter)]) == 0
    assert (f"warning: {said}\n" in capsys.readouterr().out) == bool(why)


def test_conversions_say_so_too(make_export: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exported: Exported = make_export(swappable="base")
    adapter = zeroed(exported.adapter, tmp_path / "adapter", "lora_B.weight", "trf_D.weight")
    command = [str(part) for part in ("--adapter", adapter, "--onto", exported.model, "--out")]
    out = tmp_path / "a.onnx_adapter"
    capsys.readouterr()
    assert export_cli.main([*command, str(out)]) == 0
    assert "warning: this adapter changes no layer: lora_B is zero, trf_D is zero." in capsys.readouterr().out
    assert export_cli.main([*command, str(out), "--json"]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith("this adapter changes no layer")
    (warning,) = inspect_path(out)["warnings"]
    assert warning.startswith("this adapter changes no layer: every B and D in it is zero.")
    ours = exported.model.with_name(f"{exported.adapter.name}.onnx_adapter")
    assert inspect_path(ours)["warnings"] == []


@pytest.mark.parametrize("several", [False, True], ids=["adapter", "adapters"])
def test_exports_say_so_too(make_tiny: Callable, tmp_path: Path, several: bool, capsys: pytest.CaptureFixture) -> None:
    base, original = make_tiny("distilbert", kind="lora")
    adapter = zeroed(original, tmp_path / "adapter", "nothing")
    edit_json(adapter / "adapter_config.json", lora_alpha=0)
    which = ["--adapters", f"a={adapter}"] if several else ["--adapter", str(adapter)]
    command = [*which, "--base-model", str(base), "--out", str(tmp_path / "out" / "model.onnx")]
    assert export_cli.main([*command, "--no-check"]) == 0
    prefix = "a: " if several else ""
    assert f"warning: {prefix}this adapter changes no layer: lora_alpha is 0." in capsys.readouterr().out


def test_other_weights_of_a_model_of_several(make_tiny: Callable, tmp_path: Path) -> None:
    from loratrf_deploy.export import ExportOptions, export_grouped

    base, adapter = make_tiny("distilbert", kind="lora")
    model = tmp_path / "model.onnx"
    export_grouped({"a": adapter}, model, ExportOptions(base_model=base, check=False))
    AdapterSession(model)
    change(model.with_name("model.onnx.data"), 5000, b"\xff\xff\xff")
    with pytest.raises(UserError, match="its bytes are others"):
        AdapterSession(model)
    with pytest.raises(UserError, match="its sha256 is"):
        check_grouped_parity(model, {"a": adapter}, base)
