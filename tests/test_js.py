"""js/: adapters in Node and in WebAssembly against PyTorch, and every bad input, in one process of node.

Skipped where there is no node, or `npm ci` was not run in js/ (`make test` does where npm is).
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import CHROMIUM, JS, ask_browser
from conftest import Exported
from loratrf_deploy import AdapterSession, UserError, read_adapter
from loratrf_deploy.export.onto import convert_adapter
from loratrf_deploy.formats.adapter_file import read_adapter_file, write_adapter_file, write_values
from loratrf_deploy.pytorch.base import Inputs, sample_inputs
from loratrf_deploy.pytorch.oracle import load_reference, run_torch
from loratrf_deploy.version import __version__
from shared import edit_json, error, read_json

ENGINES = ("node", "web")

INSTALLED = JS / "node_modules" / ".package-lock.json"
"""What npm writes last."""

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="no node here"),
    pytest.mark.skipif(not INSTALLED.is_file(), reason="`npm ci --ignore-scripts` was not run in js/"),
]


def ask_node(folder: Path, jobs: dict[str, Any]) -> dict[str, Any]:
    """The answers of js/test/answers.mjs."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = ["node", str(JS / "test" / "answers.mjs"), str(folder / "jobs.json"), str(folder / "answers.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return read_json(folder / "answers.json")


def tensors(inputs: Inputs) -> dict[str, Any]:
    return {
        name: {"type": str(value.dtype), "dims": value.shape, "data": value.ravel().tolist()}
        for name, value in inputs.items()
    }


def resealed(raw: bytes) -> bytes:
    """The file with the checksum that its bytes now have."""
    return raw[:-12] + zlib.crc32(raw[:-20], 0).to_bytes(4, "little") + raw[-8:]


def with_value(file: Path, value: float) -> bytes:
    """The file with `value` in the place of the first number of its first weight."""
    raw, first = bytearray(file.read_bytes()), next(iter(read_adapter_file(file).values.values()))
    at = bytes(raw).index(first.tobytes())
    raw[at : at + 4] = np.float32(value).tobytes()
    return resealed(bytes(raw))


def make_bad_files(folder: Path, good: Path) -> dict[str, str]:
    """What a file is called -> what is said of it, in both languages."""
    file, raw = read_adapter_file(good), good.read_bytes()
    first = next(iter(file.values))
    rest = {name: value for name, value in file.values.items() if name != first}
    origin = file.origin
    written = {
        "of another base": (file.values, replace(origin, base_sha256="ab" * 32)),
        "of another export": (file.values, replace(origin, model_sha256="cd" * 32)),
        "half a model": (rest, origin),
        "more than the model": ({**file.values, "layer.9.weight": file.values[first]}, origin),
        "of another type": (rest | {first: file.values[first].astype(np.float16)}, origin),
        "of other sizes": (rest | {first: file.values[first][:, :-1].copy()}, origin),
        "of two ranks": (rest | {first: file.values[first][:-1].copy()}, origin),
    }
    for name, (values, own) in written.items():
        write_adapter_file(folder / name, values, own)
    write_values(folder / "of ONNX Runtime", file.values)
    for name, content in {
        "truncated": raw[:-100],
        "without its beginning": raw[100:],
        "flipped": raw[:500] + bytes([raw[500] ^ 1]) + raw[501:],
        "not a number": with_value(good, np.nan),
        "infinite": with_value(good, -np.inf),
        "a text": b"hello, world",
        "nothing": b"",
        "too large": bytes(9_000_000) + raw,
        "of a later format": resealed(raw.replace(b'"format": 1', b'"format": 2')),
    }.items():
        (folder / name).write_bytes(content)
    return {
        "of another base": r"was made for another base model \(sha256 abababababab\) than that of .*model\.onnx \(",
        "of another export": r"was made for another export \(graph sha256 cdcdcdcdcdcd\) than .*model\.onnx \(",
        "half a model": rf"doesn't fit this model: it lacks {first}\. Convert the adapter for",
        "more than the model": r"the model takes no layer\.9\.weight\.",
        "of another type": rf"{first} is float16, expected float32",
        "of other sizes": rf"{first} is \(4, 31\), expected \(4, 32\)",
        "of two ranks": r"lora_B\.weight is \(32, 4\), expected \(32, 3\)",
        "of ONNX Runtime": "has no block at its end that says which model it fits: it was truncated, or",
        "truncated": "has no block at its end",
        "without its beginning": r"is damaged \(its checksum is wrong\)\. Convert or copy the adapter again\.",
        "flipped": r"is damaged \(its checksum is wrong\)",
        "not a number": rf"is damaged \(it holds NaN or infinite values in {first}\)",
        "infinite": rf"is damaged \(it holds NaN or infinite values in {first}\)",
        "a text": "is not an adapter file: it was truncated, or loratrf-export didn't write it. Expected a file of",
        "nothing": "is not an adapter file",
        "too large": r"has 90\d+ bytes, and an adapter of .*model\.onnx at most \d+\. Is it another model's",
        "of a later format": r"is damaged \(its format is 2, this version of loratrf-deploy reads 1\)",
    }


def make_bad_models(folder: Path, model: Path) -> None:
    """Copies of the model's folder, each with a fault of its own."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(model.parent, folder / name)) / "model.onnx"

    copy("no manifest").with_name("loratrf.json").unlink()
    copy("manifest cut").with_name("loratrf.json").write_text('{"format": 1,')
    edit_json(copy("manifest of later").with_name("loratrf.json"), format=2)
    manifest = copy("manifest of more").with_name("loratrf.json")
    swappable = read_json(manifest)["swappable"]
    more = swappable["weights"][0] | {"name": "layer.9.weight"}
    edit_json(manifest, swappable=swappable | {"weights": [*swappable["weights"], more]})
    edit_json(copy("of slots").with_name("loratrf.json"), swappable=swappable | {"slots": {"fr": 0}})
    edit_json(copy("of no adapters").with_name("loratrf.json"), swappable=None)
    graph = copy("another graph")
    graph.write_bytes(graph.read_bytes() + b"\0")
    copy("no weights").with_name("model.onnx.data").unlink()
    data = copy("weights cut").with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-1])
    data = copy("other weights").with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[::-1])


def make_answers(folder: Path, exported: Exported, half: Exported, base: Exported, two: Path, inputs: Inputs) -> None:
    """answers.json of everything that the tests below ask."""
    one = exported.model.with_name("loratrf.onnx_adapter")
    second = folder / "two.onnx_adapter"
    convert_adapter(two, exported.model, second)
    bad = folder / "bad"
    bad.mkdir()
    words = make_bad_files(bad, one)
    make_bad_models(folder / "models", exported.model)
    fed, given = tensors(inputs), {"one": str(one), "two": str(second)}
    halved = {name: value.astype(np.float32) if value.dtype.kind == "f" else value for name, value in inputs.items()}
    sessions: list[dict[str, Any]] = []
    for engine in ENGINES:
        runs = [
            {"name": f"{engine} {which}", "inputs": fed, "options": {"adapter": which[:3], "scale": scale}}
            for which, scale in {"one": 1, "two": 1, "one halved": 0.5, "one off": 0}.items()
        ]
        runs += [
            {"name": f"{engine} forgotten", "inputs": fed},
            {"name": f"{engine} none", "inputs": fed, "options": {"adapter": None}},
            {"name": f"{engine} unknown", "inputs": fed, "options": {"adapter": "three"}},
            {"name": f"{engine} blend", "inputs": fed, "options": {"adapter": {"one": 1}}},
            {"name": f"{engine} scale", "inputs": fed, "options": {"adapter": "one", "scale": 1e300}},
            {"name": f"{engine} no inputs", "options": {"adapter": "one"}},
            {"name": f"{engine} output", "inputs": fed, "options": {"adapter": "one", "outputs": ["probs"]}},
            {
                "name": f"{engine} refused",
                "inputs": fed | {"input_ids": {"type": "float32", "dims": [1, 1], "data": [1]}},
                "options": {"adapter": "one"},
            },
        ]
        common = {"engine": engine, "model": str(exported.model), "adapters": given}
        running = {"name": f"{engine} running", "inputs": fed}
        sessions.append({**common, "name": engine, "runs": runs, "running": running, "last": fed})
        for how in ("bytes", "url"):
            only = [{"name": f"{engine} {how} two", "inputs": fed, "options": {"adapter": "two"}}]
            # Through this URL the adapters come from the same stub of a server, elsewhere from files.
            own = {} if how == "url" else given
            tries = [{"name": f"{engine} {how} lost", "file": "http://here/lost.onnx_adapter"}] if how == "url" else []
            runs = only if own else []
            asked = {"name": f"{engine} {how}", "how": how, "adapters": own, "runs": runs, "tries": tries}
            sessions.append({**common, **asked})
        half_runs = [
            {"name": f"{engine} half {scale}", "inputs": tensors(halved), "options": {"adapter": "h", "scale": scale}}
            for scale in (1, 0.5, 1e30)
        ]
        own = {"h": str(half.model.with_name("loratrf.onnx_adapter"))}
        sessions.append(
            {"engine": engine, "name": f"{engine} half", "model": str(half.model), "adapters": own, "runs": half_runs}
        )
        for path in sorted((folder / "models").iterdir()):
            sessions.append({"engine": engine, "name": f"{engine} {path.name}", "model": str(path / "model.onnx")})
        sessions.append({"engine": engine, "name": f"{engine} with defaults", "model": str(base.model)})
        sessions.append({"engine": engine, "name": f"{engine} nothing there", "model": str(folder / "model.onnx")})
    model = str(exported.model)
    sessions += [
        {"engine": "web", "name": "bytes alone", "model": model, "how": "bytes", "without": "manifest"},
        {"engine": "web", "name": "no external data", "model": model, "how": "bytes", "without": "externalData"},
        {"engine": "web", "name": "a page for every file", "model": str(folder / "x" / "model.onnx"), "how": "page"},
        {
            "engine": "node",
            "name": "files",
            "model": model,
            "adapters": {"two": str(second)},
            "tries": [{"name": name, "file": str(bad / name)} for name in words],
            "loads": [
                {"name": "first", "file": str(one)},
                {"name": "again", "file": str(second)},
                {"name": "replaced", "file": str(second), "replace": True},
            ],
            "odd": fed,
        },
    ]
    (folder / "words.json").write_text(json.dumps(words))
    ask_node(folder, {"sessions": sessions, "mutants": mutants(one), "halves": HALVES})


HALVES = [
    *(sign * value for sign in (1, -1) for value in (0, 1, 0.1, 65504, 65519, 65520, 1e9, 2**-14, 2**-24, 2**-25)),
    *(2**-14 - 2**-25, 2**-25 * 1.0001, 1 + 2**-11, 1 + 3 * 2**-11, 2047 + 1 / 2, 2048 - 1 / 4, 5.9e-8, 3e-5),
    *np.random.default_rng(0).standard_normal(2000).astype(np.float32).tolist(),
]


def mutants(file: Path) -> dict[str, Any]:
    """Changes of one byte each, half of them where the tables are, with the checksum that the file then has."""
    raw, rng = file.read_bytes(), random.Random(0)
    # ONNX Runtime's writer has the tables in front and behind, between them the values.
    wanted = [
        (rng.randrange(len(raw) - 20) if turn % 2 else rng.randrange(1400), rng.randrange(256)) for turn in range(400)
    ]
    wanted.append(
        (raw.index(b"layer.0.") + len("layer."), ord("1"))
    )  # the name of another weight, which comes twice then
    changes = []
    for at, value in wanted:
        crc = zlib.crc32(raw[:at] + bytes([value]) + raw[at + 1 : -20])
        changes.append({"at": at, "value": value, "crc": crc})
    return {"file": str(file), "changes": changes}


@pytest.fixture(scope="session")
def exported(make_export: Callable[..., Exported]) -> Exported:
    return make_export(swappable="required")


@pytest.fixture(scope="session")
def inputs(exported: Exported) -> Inputs:
    return sample_inputs(load_reference(read_adapter(exported.adapter), exported.base), batch=3, sequence=7, seed=5)


@pytest.fixture(scope="session")
def two(make_tiny: Callable[..., tuple[Path, Path]]) -> Path:
    return make_tiny(kind="loratrf", r=7, lora_alpha=3, filter_rank=1, filter_gamma=0.7, seed=9)[1]


@pytest.fixture(scope="session")
def folder(
    made_once: Callable[..., Path],
    make_export: Callable[..., Exported],
    exported: Exported,
    inputs: Inputs,
    two: Path,
) -> Path:
    half, base = make_export(swappable="required", dtype="float16"), make_export(swappable="base")

    def make(folder: Path) -> None:
        make_answers(folder, exported, half, base, two, inputs)

    return made_once(make)


@pytest.fixture(scope="session")
def answers(folder: Path) -> dict[str, Any]:
    return read_json(folder / "answers.json")


def logits(answer: Any) -> np.ndarray:
    assert "logits" in answer, answer
    return np.array(answer["logits"]["data"], np.float64).reshape(answer["logits"]["dims"])


def message(answer: Any) -> str:
    assert answer["error"] == "UserError", answer
    assert "\n" not in answer["message"]
    assert answer["message"][-1] in ".)" or "ONNX Runtime" in answer["message"]
    return answer["message"]


def scaled(make_tiny: Callable[..., tuple[Path, Path]], scale: float) -> Path:
    """The adapter `one` as PEFT has it when it was saved with scaled numbers: alpha 8 and gamma 1 by default."""
    return make_tiny(kind="loratrf", lora_alpha=8 * scale, filter_gamma=scale)[1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.consumer("onnxruntime-node", "swapped")
@pytest.mark.consumer("onnxruntime-web, WebAssembly", "swapped")
def test_outputs_are_pytorchs(
    answers: dict, exported: Exported, two: Path, inputs: Inputs, make_tiny: Callable, engine: str
) -> None:
    adapters = {"one": exported.adapter, "two": two, "one halved": scaled(make_tiny, 0.5), "bytes two": two}
    right = {}
    for name, adapter in adapters.items():
        right[name] = run_torch(load_reference(read_adapter(adapter), exported.base), inputs)["logits"]
        got = logits(answers[f"{engine} {name}"])
        assert got.shape == right[name].shape
        assert error(got, right[name]) < 1e-5, name
    assert error(right["one"], right["two"]) > 1e-2
    assert error(right["one"], right["one halved"]) > 1e-3
    reference = load_reference(read_adapter(exported.adapter), exported.base)
    off = run_torch(reference, inputs, adapter_on=False)["logits"]
    assert error(logits(answers[f"{engine} one off"]), off) < 1e-5  # the layers are the base's, the head the adapter's
    assert error(logits(answers[f"{engine} running"]), right["one"]) < 1e-5  # it was unloaded meanwhile
    assert "No adapter" in message(answers[f"{engine} running, after"])
    assert "No adapter" in message(answers[f"{engine} running, twice"])
    assert answers[f"{engine}, released"] == ["run", "released"]  # a run that has begun ends first
    assert answers[engine] == {
        "inputs": list(answers[engine]["inputs"]),
        "outputs": ["logits"],
        "adapters": ["one", "two"],
    }
    assert set(answers[engine]["inputs"]) == set(inputs)


@pytest.mark.parametrize("engine", ENGINES)
def test_float16(answers: dict, make_export: Callable, make_tiny: Callable, inputs: Inputs, engine: str) -> None:
    half = make_export(swappable="required", dtype="float16")
    session = AdapterSession(half.model, library=False)
    session.load("h", half.model.with_name("loratrf.onnx_adapter"))
    for scale in (1, 0.5):
        expected = session.run(inputs, adapter="h", scale=float(scale))["logits"].astype(np.float64)
        assert error(logits(answers[f"{engine} half {scale}"]), expected) < 2e-3


def test_halves_round_as_numpy_does(answers: dict) -> None:
    with np.errstate(over="ignore"):
        expected = np.array(HALVES, np.float32).astype(np.float16).view(np.uint16)
    assert answers["toHalf"] == expected.tolist()
    values = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float64)
    assert answers["fromHalf"] == [value if np.isfinite(value) else None for value in values.tolist()]


def test_files_that_python_refuses_are_refused_in_the_same_words(
    answers: dict, folder: Path, exported: Exported
) -> None:
    words = read_json(folder / "words.json")
    session = AdapterSession(exported.model)
    for name, said in words.items():
        with pytest.raises(UserError, match=said):
            session.load("x", folder / "bad" / name)
        with pytest.raises(UserError, match=said):
            raise UserError(message(answers[name]))
    assert answers["first"] == "loaded"
    assert message(answers["again"]) == (
        'An adapter "another" is loaded already. Choose another name, unload it first, or pass {replace: true}.'
    )
    assert answers["replaced"] == "loaded"


def test_a_byte_that_is_wrong_is_judged_as_python_judges_it(answers: dict, folder: Path, exported: Exported) -> None:
    job = mutants(exported.model.with_name("loratrf.onnx_adapter"))
    raw, file = Path(job["file"]).read_bytes(), folder / "mutant"
    expected = []
    for change in job["changes"]:
        at, value, crc = change.values()
        file.write_bytes(raw[:at] + bytes([value]) + raw[at + 1 : -12] + crc.to_bytes(4, "little") + raw[-8:])
        try:
            read_adapter_file(file)
            expected.append("read")
        except UserError:
            expected.append("refused")
    assert {"read", "refused"} == set(expected)
    assert answers["mutants"] == expected


MODELS = {
    "no manifest": r"loratrf\.json can't be read: .*It says what adapters the model takes\. Keep an export's files",
    "manifest cut": r"loratrf\.json can't be read \(.*JSON.*\)\. Expected the one of the export, beside its",
    "manifest of later": r"loratrf\.json has the format 2, and this version of loratrf-deploy reads 1\. Update",
    "manifest of more": r"doesn't take what the loratrf\.json beside it says: layer\.9\.weight is no input of it",
    "of slots": r"exported with --adapters: .* in JavaScript\. Export the adapters one by one\. Export it with",
    "of no adapters": r"takes no adapters at run time\. Export it with --swappable required\.$",
    "another graph": r"model\.onnx is not the file that loratrf\.json describes: it was changed or replaced",
    "no weights": r"model\.onnx\.data can't be read.* model's weights are in it.*Keep an export's files together\.$",
    "weights cut": r"model\.onnx\.data is not the file that loratrf\.json describes: it has \d+ bytes, expected \d+\.",
    "other weights": r"model\.onnx\.data is not the file that loratrf\.json describes: its bytes are others\.",
    "with defaults": r"was exported with --swappable base, .* answer as if no adapter were named\. Export it with",
    "nothing there": r"model\.onnx can't be read: .*Expected a model\.onnx of loratrf-export --swappable required\.$",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_models_that_are_not_as_they_were_exported_are_refused(answers: dict, engine: str) -> None:
    for name, said in MODELS.items():
        with pytest.raises(UserError, match=said):
            raise UserError(message(answers[f"{engine} {name}"]))


RUNS = {
    "forgotten": r"^This model needs an adapter in every run, and this one names none\. Loaded: \"one\", \"two\"\. N",
    "none": r"^This model needs an adapter in every run",
    "unknown": r"^No adapter \"three\" is loaded\. Loaded: \"one\", \"two\"\. Load it first: await session\.load\(",
    "blend": r"^The adapter is an Object, expected the name of a loaded one: \"one\", \"two\"\.$",
    "scale": r"^scale is 1e\+300, expected a finite number that float32 holds, such as 1 or 0\.5\.$",
    "half 1e+30": r"^scale is 1e\+30, with which .*lora_B\.weight exceeds float16, .*Take a smaller one\.$",
    "no inputs": r"^The inputs are none, the model takes input_ids, ",
    "output": r"^The model has no output probs\. It gives logits\.$",
    "refused": r"^ONNX Runtime can't run the model on input_ids \(1, 1\) float32, .*expected: \(tensor\(int64\)\)",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_runs_that_say_what_is_missing(answers: dict, engine: str) -> None:
    for name, said in RUNS.items():
        with pytest.raises(UserError, match=said):
            raise UserError(message(answers[f"{engine} {name}"]))


def test_bytes_urls_and_what_a_page_says(answers: dict) -> None:
    for name, said in {
        "bytes alone": r"given as bytes, without the loratrf\.json that says what adapters it takes\. Pass {man",
        "no external data": r"^The model's weights are in model\.onnx\.data, and it isn't in externalData\. Pass {ext",
        "a page for every file": r"^http://here/loratrf\.json can't be read \(it is a page: the server has",
        "web url lost": r"lost\.onnx_adapter can't be read: the server answers 404 Not Found\. Expected a file of",
        "no tensor": r"^input_ids is an Array, expected a tensor, such as new ort\.Tensor\(\"int64\", ",
        "no ort": r"^undefined was given for ONNX Runtime\. Pass the module: import \* as ort from",
        "no source": r"^7 was given for a file, expected a path, a URL, or its bytes as a Uint8Array\.$",
        "no name": r"^The adapter's name is \"\", expected a text that isn't empty\.$",
        "no secure context": r"^This page isn't a secure context, .*Serve it over https, or from localhost\.$",
    }.items():
        with pytest.raises(UserError, match=said):
            raise UserError(message(answers[name]))
    assert answers["web url"]["outputs"] == answers["node url"]["outputs"] == ["logits"]


def test_an_engine_without_simd_is_told_which_have_it(exported: Exported, tmp_path: Path) -> None:
    jobs = {"noSimd": True, "sessions": [{"engine": "web", "name": "old", "model": str(exported.model)}]}
    assert message(ask_node(tmp_path, jobs)["old"]).startswith("This engine's WebAssembly has no SIMD, which onnxrunt")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.consumer("onnxruntime-web, WebGPU", "swapped")
def test_a_browser_runs_adapters_in_webassembly_and_webgpu(
    folder: Path, exported: Exported, two: Path, inputs: Inputs, make_tiny: Callable, tmp_path: Path
) -> None:
    adapters = {"one": (exported.adapter, 1), "two": (two, 1), "halved": (scaled(make_tiny, 0.5), 0.5)}
    runs = [{"adapter": name[:3].replace("hal", "one"), "scale": scale} for name, (_, scale) in adapters.items()]
    shutil.copy(folder / "two.onnx_adapter", tmp_path)
    answers = ask_browser({"inputs": tensors(inputs), "runs": runs}, exported.folder, tmp_path)
    assert "error" not in answers, answers["error"]
    for provider, given in answers.items():
        for (adapter, _), answer in zip(adapters.values(), given, strict=True):
            right = run_torch(load_reference(read_adapter(adapter), exported.base), inputs)["logits"]
            assert error(logits(answer), right) < 1e-5, provider
    assert "wasm" in answers
    if "webgpu" not in answers:
        pytest.skip("Chromium gives no WebGPU here; WebAssembly passed")


def test_types_and_version() -> None:
    assert read_json(JS / "package.json")["version"] == __version__
    done = subprocess.run(
        ["node", "node_modules/typescript/bin/tsc", "-p", "."], cwd=JS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
