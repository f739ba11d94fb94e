"""Files that claim more than they are: refused by header and config before they are read, and read into memory once."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file
from test_adapter import CONFIG, KEY, N, R, some_tensors, write

from loratrf_deploy.adapters import weights_file
from loratrf_deploy.adapters.adapter import read_adapter
from loratrf_deploy.errors import UserError
from loratrf_deploy.formats.inspection import inspect_path
from loratrf_deploy.formats.manifest import read_manifest
from loratrf_deploy.genai.generate import read_config as read_genai_config
from loratrf_deploy.runtime.adapter_session import AdapterSession
from shared import run_python

HUGE = 8 << 30
PEAK = """
import re, sys
from loratrf_deploy import UserError, read_adapter
from loratrf_deploy.formats.adapter_file import read_adapter_file
from loratrf_deploy.formats.manifest import read_manifest
def memory(what): return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
try:
    RESULT
except UserError as error:
    print(error)
print(memory("VmHWM") - before)
"""


def peak(expression: str, *arguments: object) -> tuple[str, int]:
    """(what a UserError said, bytes of memory that `expression` took at most) in a process of its own."""
    done = run_python(PEAK.replace("RESULT", expression), *arguments)
    assert done.returncode == 0, done.stderr
    *said, taken = done.stdout.splitlines()
    return " ".join(said), int(taken)


def header_of(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def sparse(path: Path, begin: bytes, end: bytes = b"", size: int = HUGE) -> None:
    """A file of `size` bytes that takes next to no room on the disk."""
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(size)
        file.seek(size - len(end))
        file.write(end)


def claim(name: str, shape: list[int], dtype: str = "F32") -> Callable[[Path], None]:
    """Weights that hold one tensor, of zeros that are nowhere."""
    size = 4 * int(np.prod(shape))
    header = header_of({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}})
    return lambda folder: sparse(folder / "adapter_model.safetensors", header, size=len(header) + size)


VALUES = HUGE // 4
CLAIMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor that the config doesn't name": (claim("base_model.model.mystery", [VALUES]), "no rule uses"),
    "a tensor of another rank": (claim(f"{KEY}.lora_A.weight", [R + 1, VALUES // (R + 1)]), "incomplete"),
    "a bias that isn't trained": (claim(f"{KEY}.base_layer.bias", [VALUES]), "no rule uses"),
    "a tensor of many dimensions": (claim(f"{KEY}.lora_A.weight", [VALUES] + [1] * 64), "65 dimensions, expected at m"),
    "a header of 4 GB": (
        lambda folder: sparse(folder / "adapter_model.safetensors", struct.pack("<Q", 4 << 30) + b"{"),
        "its header has 4294967296 bytes, expected at most 33554432",
    ),
    "nothing but zeros": (lambda folder: sparse(folder / "adapter_model.safetensors", b""), "not a valid safetensors"),
    "a config of 8 GB": (lambda folder: sparse(folder / "adapter_config.json", b"{}"), "more than 4194304 bytes"),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_claims_are_refused_before_they_are_read(tmp_path: Path, what: str) -> None:
    spoil, words = CLAIMS[what]
    spoil(write(tmp_path))
    said, taken = peak("read_adapter(sys.argv[1])", tmp_path)
    assert re.search(words, said), said
    assert taken < 100e6


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (R + 1, "A has shape (3, 536870912), expected (R, K) with R = 2"),
        (R, "are on the disk: the rest was never written"),
    ],
)
def test_a_huge_tensor_of_the_adapter_is_refused_before_it_is_read(tmp_path: Path, rank: int, words: str) -> None:
    write(tmp_path)
    tensors = {f"{KEY}.lora_A.weight": (rank, VALUES // 4), f"{KEY}.lora_B.weight": (N, R)}
    entries, end = {}, 0
    for name, shape in tensors.items():
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * int(np.prod(shape))]}
    header = header_of(entries)
    sparse(tmp_path / "adapter_model.safetensors", header, size=len(header) + end)
    said, taken = peak("read_adapter(sys.argv[1])", tmp_path)
    assert words in said
    assert taken < 100e6


def test_more_than_there_is_memory_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    needed = 4 * sum(value.size for value in some_tensors().values())
    monkeypatch.setattr(weights_file, "_memory", lambda: needed)
    read_adapter(tmp_path)
    monkeypatch.setattr(weights_file, "_memory", lambda: needed - 1)
    with pytest.raises(UserError, match=r"takes 0\.0 GB in memory \(as float32\), more than there is here"):
        read_adapter(tmp_path)


def test_less_memory_than_the_system_allows(tmp_path: Path) -> None:
    """A head may be of any size; what it takes is known before."""
    write(tmp_path)
    claim("base_model.model.classifier.weight", [VALUES])(tmp_path)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); read_adapter(sys.argv[1])"
    said, taken = peak(limited, tmp_path)
    assert re.search("holds no adapter weights|takes 8.6 GB in memory", said), said
    assert taken < 100e6


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16, np.float64])
def test_one_copy_in_memory(tmp_path: Path, dtype: Any) -> None:
    """What is held in the end, a piece of the file, and what numpy needs to look at it."""
    write(tmp_path, some_tensors() | {"base_model.model.classifier.weight": np.ones((2, 12_000_000), dtype)})
    head = read_adapter(tmp_path).modules_to_save["classifier"]["weight"]
    assert (head.dtype, head.shape, head.min(), head.max()) == (np.float32, (2, 12_000_000), 1, 1)
    said, taken = peak("kept = read_adapter(sys.argv[1])", tmp_path)
    assert not said
    assert head.nbytes < taken < 1.3 * head.nbytes


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some_tensors() | {"base_model.model.classifier.weight": np.ones((2, 9_000), np.float32)})
    weights, real = tmp_path / "adapter_model.safetensors", weights_file.WeightsFile.read_into
    raw = weights.read_bytes()
    for after in (raw[:-1], raw + b"\0"):

        def read_into(file: Any, tensors: Any, after: bytes = after) -> str:
            weights.write_bytes(after)
            return real(file, tensors)

        weights.write_bytes(raw)
        monkeypatch.setattr(weights_file.WeightsFile, "read_into", read_into)
        with pytest.raises(UserError, match="changed while it was read"):
            read_adapter(tmp_path)


WORDS = '0 1 3 - 6 12 } { , [ ] " F32 F64 I64 e1 "shape" "t1" [3,1] null true NaN "a":1, 1.0 é \\u0041 []'


def test_what_is_read_is_what_safetensors_own_reader_reads(tmp_path: Path) -> None:
    """Headers with a byte or a word changed: what is taken here is taken there, with the same values."""
    rng, file, taken = random.Random(0), tmp_path / "adapter_model.safetensors", 0
    kinds = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_)
    numbered = {f"t{number}": np.arange(3 * number).astype(kind) for number, kind in enumerate(kinds)}
    save_file({name: value.reshape(3, -1) for name, value in numbered.items()}, file, {"format": "pt"})
    raw = file.read_bytes()
    length = struct.unpack_from("<Q", raw)[0]
    words = [word.encode() for word in WORDS.split()] + [b" "]
    for _ in range(3000):
        begin = rng.randrange(8, 8 + length)
        header = raw[8:begin] + rng.choice(words) + raw[begin + rng.choice((0, 1, 1, 2, 3)) : 8 + length]
        changed = struct.pack("<Q", len(header)) + header + raw[8 + length :]
        file.write_bytes(changed)
        try:
            with file.open("rb") as opened:
                ours = weights_file.WeightsFile(file, opened)
                values = ours.unread()
                ours.read_into(values)
        except UserError:
            continue
        taken += 1
        theirs = dict(safetensors.deserialize(changed))
        assert values.keys() == theirs.keys()
        for name, entry in theirs.items():
            stored = np.frombuffer(entry["data"], ours.stored[name].dtype).reshape(entry["shape"])
            np.testing.assert_array_equal(values[name], stored.astype(values[name].dtype))
    assert taken > 50


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = some_tensors() | {
        "base_model.model.classifier.scalar": np.array(3, np.float32),
        "base_model.model.classifier.empty": np.ones((0, 4), np.float16),
        "base_model.model.classifier.steps": np.arange(5),
    }
    save_file(tensors, write(tmp_path) / "adapter_model.safetensors", {"format": "pt", "some": "thing"})
    head = read_adapter(tmp_path).modules_to_save["classifier"]
    for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
        if "classifier" in name:
            np.testing.assert_array_equal(head[name.rpartition(".")[2]], value)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "a name twice": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":1}', "it has 'a' twice"),
    "a name without end": (json.dumps({"a" * 501: ENTRY}).encode(), "a tensor's name has 501 characters"),
    "half of a pair": (json.dumps({"__metadata__": {"a": "\ud800"}, "b": ENTRY}).encode(), "surrogates not allowed"),
    "a path without end": (json.dumps({"a." * 51: ENTRY}).encode(), "51 dots"),
    "nesting": (b'{"a":' * 50_000, "nested more than 100 deep"),
    "nesting that a string hides": (b'{"]]]]]":' + b"[" * 101, "nested more than 100 deep"),
    "a shape of booleans": (json.dumps({"a": ENTRY | {"shape": [True, 2]}}).encode(), "the shape of a is none"),
    "a hole": (json.dumps({"a": ENTRY | {"data_offsets": [1, 9]}}).encode(), "not what its place in the file holds"),
    "an overlap": (json.dumps({"a": ENTRY, "b": ENTRY}).encode(), "not what its place in the file holds"),
    "an entry that is none": (b'{"a": 1}', "it doesn't say where a is"),
    "metadata that is no text": (
        json.dumps({"__metadata__": {"a": 1}, "b": ENTRY}).encode(),
        "__metadata__ is no object",
    ),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_are_none(tmp_path: Path, what: str) -> None:
    header, words = HEADERS[what]
    raw = struct.pack("<Q", len(header)) + header + bytes(8)
    (write(tmp_path) / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match=f"not a valid safetensors file .*{words}"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("depth", [101, 5_000, 90_000])
def test_nested_json_is_refused_whoever_reads_it(tmp_path: Path, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG)[:-1] + f', "task_type": {deep}}}')
    with pytest.raises(UserError, match=r"not valid JSON .nested more than 100 deep"):
        read_adapter(tmp_path)
    (tmp_path / "loratrf.json").write_text(f'{{"format": 1, "parity": {deep}}}')
    with pytest.raises(UserError, match="nested more than 100 deep"):
        read_manifest(tmp_path / "loratrf.json")
    (tmp_path / "genai_config.json").write_text(f'{{"model": {deep}}}')
    with pytest.raises(UserError, match="nested more than 100 deep"):
        read_genai_config(tmp_path)


def test_nesting_within_bounds_is_shown(tmp_path: Path) -> None:
    (write(tmp_path) / "adapter_config.json").write_text(json.dumps(CONFIG)[:-1] + f', "r": {"[" * 99}{"]" * 99}}}')
    with pytest.raises(UserError, match=r"r is \[\[\[\[.*\.\.\., expected a whole number"):
        read_adapter(tmp_path)


END = struct.Struct("<QI8s")


def test_adapter_files_that_claim_more_than_they_are(make_export: Callable, tmp_path: Path) -> None:
    exported = make_export(swappable="base")
    folder = Path(shutil.copytree(exported.model.parent, tmp_path / "out"))
    good = next(folder.glob("*.onnx_adapter"))
    session = AdapterSession(folder / "model.onnx")
    session.load("good", good)
    huge = folder / "huge.onnx_adapter"
    sparse(huge, good.read_bytes()[:100], END.pack(100, 0, b"LORATRF1"))
    with pytest.raises(UserError, match=rf"huge.onnx_adapter has {HUGE} bytes, and an adapter of .* at most \d+"):
        session.load("huge", huge)
    assert inspect_path(folder)["swappable"]["other_files"] == ["huge.onnx_adapter"]
    with pytest.raises(UserError, match="more than max_bytes, which is 100"):
        AdapterSession(folder / "model.onnx", max_bytes=100).load("good", good)
    sparse(huge, b"", END.pack(4 << 30, 0, b"LORATRF1"))
    said, taken = peak("read_adapter_file(sys.argv[1])", huge)
    assert "is not an adapter file: it was truncated" in said
    assert taken < 100e6
    sparse(huge, b"")
    said, taken = peak("read_adapter_file(sys.argv[1])", huge)
    assert "is not an adapter file: it was truncated" in said
    assert taken < 100e6
    sparse(folder / "loratrf.json", (folder / "loratrf.json").read_bytes())
    said, taken = peak("read_manifest(__import__('pathlib').Path(sys.argv[1]))", folder / "loratrf.json")
    assert "more than 67108864 bytes" in said
    assert taken < 200e6


def test_the_largest_adapter_of_a_model_still_loads(make_tiny: Callable, make_export: Callable, tmp_path: Path) -> None:
    """The bound is that of the operators' highest rank."""
    from loratrf_deploy.export.onto import convert_adapter
    from loratrf_deploy.ops.schemas import MAX_RANK

    exported = make_export(swappable="base")
    _, adapter = make_tiny(kind="loratrf", r=MAX_RANK, filter_rank=MAX_RANK)
    convert_adapter(adapter, exported.model, tmp_path / "large.onnx_adapter")
    session = AdapterSession(exported.model)
    session.load("large", tmp_path / "large.onnx_adapter")
    assert session.adapters["large"].resident
