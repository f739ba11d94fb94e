"""What the fuzzers attack, and what must hold of every answer: refused in one paragraph with nothing left, or right.

A target makes its samples in a folder once (`prepare`, with torch) and then judges any number of seeds (`case`). It
returns "accepted" or "refused"; whatever else happens (an exception, a hang, a dead process) is a finding.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/: run from anywhere, by pytest or by hand

from mutations import CONFIG, WEIGHTS, dump_json, spoil_bytes, spoil_folder, spoil_json
from operators import (
    CASES,
    GROUPED_CASES,
    attributes_of,
    expected_of,
    model_of,
    run,
    session_of,
    values_of,
)
from operators import (
    WEIGHTS as OPERATOR_WEIGHTS,
)
from shared import IDS

__all__ = ["TARGETS", "Target"]

FILE = "fr.onnx_adapter"
_END = struct.Struct("<QI8s")


class Target(NamedTuple):
    """`prepare(folder)` writes samples; `case(folder, rng, scratch)` judges one, in an empty `scratch`."""

    prepare: Callable[[Path], None]
    case: Callable[[Path, Random, Path], str]


def command(main: Callable[[list[str]], int], *arguments: object) -> tuple[int, str]:
    """A command line's (exit code, stderr), held to what is promised of a refusal: one short, printable paragraph."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    said = err.getvalue()
    assert code in (0, 2), f"exit code {code}: {said}"
    for text in (out.getvalue(), said):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), f"raw control characters: {text!r}"
    if code == 2:
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, f"more than a paragraph: {said!r}"
        assert len(said) <= 1100, f"{len(said)} characters"
    return code, said


def refusal(error: Exception, deserved: bool = True) -> str:
    """ "refused", where it was deserved and is one short paragraph."""
    assert deserved, error
    assert len(str(error)) <= 1100, error
    return "refused"


# Adapter folders: `loratrf-inspect` and `loratrf-export --onto`


def prepare_adapters(folder: Path) -> None:
    """LoRA and LoRATRF adapters of a small BERT, and a swappable model that takes either."""
    import tiny
    from loratrf_deploy.export import ExportOptions, export_adapter

    base = tiny.make_base(folder / "base", "bert", "text-classification")
    tiny.make_adapter(base, folder / "loratrf", kind="loratrf")
    tiny.make_adapter(base, folder / "lora", kind="lora", rank_pattern={"0.attention.self.query": 3}, use_rslora=True)
    options = ExportOptions(base_model=base, swappable="base", check=False)
    export_adapter(folder / "loratrf", folder / "model" / "model.onnx", options)


def case_adapter(folder: Path, rng: Random, scratch: Path) -> str:
    from loratrf_deploy.cli.export import main as export
    from loratrf_deploy.cli.inspect import main as inspect

    adapter = scratch / "adapter"
    shutil.copytree(folder / rng.choice(("lora", "loratrf")), adapter)
    spoil_folder(adapter, rng)
    command(inspect, adapter)
    out = scratch / "out" / FILE
    code, _ = command(
        export,
        "--adapter",
        adapter,
        "--onto",
        folder / "model" / "model.onnx",
        "--base-model",
        folder / "base",
        "--out",
        out,
    )
    left = [path.name for path in scratch.rglob("*") if adapter not in (path, *path.parents) and not path.is_dir()]
    if code:
        assert not left, f"refused, and left {left}"
        return "refused"
    assert left == [FILE], left
    with contextlib.suppress(Endless), ends_after(1):
        check_converted(adapter, out, folder / "model")
    return "accepted"


class Endless(Exception):
    """PEFT's own matching of a pattern, which nothing bounds, didn't end: no oracle for this adapter."""


@contextlib.contextmanager
def ends_after(seconds: float) -> Iterator[None]:
    """Raises Endless in what is inside after `seconds`: `re` looks for signals while it matches."""

    def stop(*_: object) -> None:
        raise Endless

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("exclude_modules", "layers_pattern", "layers_to_transform", "filter_target_modules")),
    **{"rank_pattern": None, "alpha_pattern": None, "use_rslora": False, "filter_gamma": 1.0},
}
"""What PEFT (and LoRATRF's config) takes a field for that the file lacks."""


def check_converted(adapter: Path, file: Path, model: Path) -> None:
    """Whether `file` holds all of `adapter` and nothing else, by readers and rules that aren't ours.

    safetensors and ONNX Runtime read the two, PEFT says which layers the config adapts.
    """
    import onnxruntime
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key
    from safetensors.numpy import load_file

    config = SimpleNamespace(**_DEFAULTS | json.loads((adapter / CONFIG).read_bytes()))
    tensors = {name.removeprefix("base_model.model."): value for name, value in load_file(adapter / WEIGHTS).items()}
    content = onnxruntime.AdapterFormat.read_adapter(str(file))
    values = {name: value.numpy().copy() for name, value in content.get_parameters().items()}  # views of `content`
    manifest = json.loads((model / "loratrf.json").read_bytes())
    for weight in manifest["swappable"]["weights"]:
        module, part = weight["module"], weight["part"]
        value = values.pop(weight["name"])
        if part not in ("A", "B", "tau", "C", "D"):
            given = tensors.pop(f"{module}.{part}", None)
            assert given is not None, f"{module}.{part} is not in the file"
            np.testing.assert_allclose(value.T if weight["transposed"] else value, given, rtol=1e-6)
            continue
        low = part in "AB"
        key = f"{module}.{weight['name'].removeprefix(module + '.')}"
        given = tensors.pop(key, None)
        targets = SimpleNamespace(**vars(config))
        if not low:
            targets.target_modules = config.filter_target_modules or config.target_modules
        if str(targets.target_modules).lower() == "all-linear":
            targets.target_modules = ".*"  # PEFT lists the layers then: all that are here
        wanted = (low or config.peft_type == "LORATRF") and bool(check_target_module_exists(targets, module))
        assert wanted == (given is not None), f"{key}: the config says {wanted}, the file {given is not None}"
        if given is None:
            assert not value.any(), f"{key} is not the adapter's"
            continue
        scale = 1.0
        if part == "B":
            rank = config.rank_pattern or {}
            alpha = config.alpha_pattern or {}
            rank = rank.get(get_pattern_key(rank, module), config.r)
            alpha = alpha.get(get_pattern_key(alpha, module), config.lora_alpha)
            scale = alpha / (rank**0.5 if config.use_rslora else rank)
        elif part == "D":
            scale = config.filter_gamma
        smallest = np.finfo(np.float32).tiny  # below it float32 has fewer digits
        np.testing.assert_allclose(value, given.astype(np.float64) * scale, rtol=2e-6, atol=smallest)
    assert not values, f"the file holds {sorted(values)}"
    assert not [name for name in tensors if ".lora_" in name or ".trf_" in name], f"left out: {sorted(tensors)}"


# .onnx_adapter files and manifests: `AdapterSession.load`, `loratrf-inspect`


def prepare_adapter_files(folder: Path) -> None:
    prepare_adapters(folder)


def case_adapter_file(folder: Path, rng: Random, scratch: Path) -> str:
    from loratrf_deploy import AdapterSession, UserError
    from loratrf_deploy.cli.inspect import main as inspect
    from loratrf_deploy.formats.adapter_file import read_adapter_file

    model = folder / "model" / "model.onnx"
    if rng.random() < 0.3:
        return _case_manifest(model, rng, scratch)
    session = _sessions.get(model) or _sessions.setdefault(model, AdapterSession(model))
    file = scratch / FILE
    file.write_bytes(_spoiled_file((model.parent / "loratrf.onnx_adapter").read_bytes(), rng))
    code, _ = command(inspect, file)
    try:
        session.load("fr", file)
    except UserError as error:
        return refusal(error, "fr" not in session.adapters)
    try:
        assert code == 0
        (actual,) = session.run(IDS, adapter="fr").values()
        # What a model makes of large numbers may be none; what it was given is.
        assert all(np.isfinite(value).all() for value in read_adapter_file(file).values.values())
        np.testing.assert_allclose(actual, _by_onnxruntime(model, file), rtol=1e-5, atol=1e-5)
    finally:
        session.unload("fr")
    return "accepted"


_sessions: dict[Path, Any] = {}


def _spoiled_file(raw: bytes, rng: Random) -> bytes:
    """Damaged bytes, or a damaged block or description under a checksum that is right again."""
    if rng.random() < 0.3:
        return spoil_bytes(raw, rng)
    length, _, magic = _END.unpack_from(raw, len(raw) - _END.size)
    end = len(raw) - _END.size - length
    block, text = raw[:end], raw[end : -_END.size]
    if rng.random() < 0.3:
        text = dump_json(spoil_json(json.loads(text), rng))
    elif rng.random() < 0.2:
        values = bytearray(block)  # a weight that is no number
        position = 4 * rng.randrange(len(values) // 8, len(values) // 4)
        values[position : position + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"))))
        block = bytes(values)
    else:
        block = spoil_bytes(block, rng)
    return block + text + _END.pack(len(text), zlib.crc32(block + text), magic)


def _case_manifest(model: Path, rng: Random, scratch: Path) -> str:
    """A loratrf.json that was changed: inspected, and opened with its model."""
    from loratrf_deploy import AdapterSession, UserError
    from loratrf_deploy.cli.inspect import main as inspect

    for path in model.parent.iterdir():
        shutil.copy(path, scratch)
    manifest = scratch / "loratrf.json"
    content = manifest.read_bytes()
    manifest.unlink()
    whole = json.loads(content)
    part = rng.choice(("swappable", "adapter", "base", "model", "layers", None))
    spoiled = {**whole, part: spoil_json(whole[part], rng)} if part else spoil_json(whole, rng)
    manifest.write_bytes(dump_json(spoiled) if rng.random() < 0.9 else spoil_bytes(content, rng))
    command(inspect, scratch)
    file = scratch / "loratrf.onnx_adapter"
    try:
        session = AdapterSession(scratch / model.name)
        session.load("fr", file)
        (actual,) = session.run(IDS, adapter="fr").values()
    except UserError as error:
        return refusal(error)
    np.testing.assert_allclose(actual, _by_onnxruntime(model, file), rtol=1e-5, atol=1e-5)
    return "accepted"


def _by_onnxruntime(model: Path, file: Path) -> np.ndarray:
    """The answer under ONNX Runtime's own adapter loader; the whole file's where only padding's rules were broken."""
    import onnxruntime as ort

    from loratrf_deploy import create_session

    plain = _plain.get(model) or _plain.setdefault(model, create_session(model))
    adapter = ort.LoraAdapter()
    try:
        adapter.Load(str(file))
    except RuntimeError:  # its verifier looks at what nobody reads; what is read must be as it was
        adapter.Load(str(model.with_name("loratrf.onnx_adapter")))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    return plain.run(None, IDS, options)[0]


_plain: dict[Path, Any] = {}


# Graphs: one node with the library


def prepare_graphs(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def case_graph(folder: Path, rng: Random, scratch: Path) -> str:
    op, filter_input = rng.choice((*CASES, *GROUPED_CASES))
    lead = rng.choice(((1,), (3,), (17,), (2, 5), (0,), (4, 0), (1, 1, 3)))
    sizes = {name: rng.choice(choices) for name, choices in _SIZES.items()}
    values = values_of(op, lead, seed=rng.randrange(1 << 30), **sizes)
    spoils = rng.choice((0, 1, 1, 1, 2, 3))
    for _ in range(spoils):
        _spoil_value(values, rng)
    constant = OPERATOR_WEIGHTS if rng.random() < 0.4 else ()
    attributes: dict[str, Any] = attributes_of(op, filter_input)
    if attributes and rng.random() < 0.05:
        spoils, attributes = spoils + 1, {"filter_input": rng.choice(("both", "", 1, 2.0, "x" * 5000))}
    dtype = rng.choice(("float32", "float32", "float16", "bfloat16"))
    try:
        model = model_of(op, values, dtype, constant, attributes, functions=False)
        if rng.random() < 0.03:
            # Without weights inside: a changed weight is another model, and rightly accepted.
            whole = model_of(op, values, dtype, (), attributes, functions=False)
            spoils, model = spoils + 1, spoil_bytes(whole, rng)
        with np.errstate(over="ignore"):
            actual = run(session_of(model, threads=1), values)
    except Exception as error:  # ONNX Runtime's, of several classes
        return refusal(error, spoils > 0)
    _check_answer(op, values, dtype, attributes.get("filter_input", "adapted"), actual)
    return "accepted"


_SIZES = {"K": (1, 2, 19, 64, 99), "N": (1, 3, 16, 99, 130), "R": (1, 4, 33), "F": (1, 7, 16), "S": (1, 3)}


def _spoil_value(values: dict[str, np.ndarray], rng: Random) -> None:
    name = rng.choice(list(values))
    value, what = values[name], rng.randrange(8)
    if name == "adapter_ids" and what < 5:
        values[name] = np.full_like(value, rng.choice((-(2**63), -2, -1, 0, 3, 10**9, 2**63 - 1)))
    elif what == 0:
        values[name] = value[..., None]
    elif what == 1:
        values[name] = value[None]
    elif what == 2:
        values[name] = value.reshape(-1)
    elif what == 3:
        values[name] = value.T
    elif what == 4 and value.ndim:
        axis = rng.randrange(value.ndim)
        values[name] = np.take(value, range(max(0, value.shape[axis] - 1)), axis)
    elif what == 5 and value.ndim:
        axis = rng.randrange(value.ndim)
        values[name] = np.concatenate([value, value], axis)
    elif what == 6 and value.dtype == np.float32 and value.size:
        values[name] = value * np.float32(rng.choice((0, 1e-30, 1e30)))
    elif value.ndim:
        axis = rng.randrange(value.ndim)
        values[name] = np.take(value, [], axis)


def _check_answer(op: str, values: dict[str, np.ndarray], dtype: str, filter_input: str, actual: np.ndarray) -> None:
    """What was accepted is what the float64 reference says; beyond the type's range nothing is promised."""
    from tolerances import assert_close

    with np.errstate(all="ignore"):
        expected = expected_of(op, values, dtype, filter_input)
    largest = np.abs(expected).max(initial=0)
    inside = all(
        np.abs(v).max(initial=0) < 1e4 and (not v.any() or np.abs(v).max(initial=0) > 1e-4) for v in values.values()
    )
    if inside and largest < 1e4:
        with contextlib.redirect_stdout(io.StringIO()):
            assert_close(actual, expected, dtype, op)
    else:
        assert actual.shape == expected.shape


TARGETS = {
    "adapters": Target(prepare_adapters, case_adapter),
    "adapter-files": Target(prepare_adapter_files, case_adapter_file),
    "graphs": Target(prepare_graphs, case_graph),
}
