"""loratrf.json, which says what is in the exported model beside it: its fields, its one writer and its one reader."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..adapters.adapter import Adapter
from ..adapters.json_text import parse_json
from ..errors import UserError
from ..files import open_regular, read_regular, readable
from ..ops.dtypes import DType
from ..ops.schemas import FUNCTIONS, Device
from .decode import decode
from .embedding import Embedding
from .swappable import Default, RuntimeWeight
from .tasks import TaskPart

__all__ = [
    "MANIFEST",
    "AdapterId",
    "AdapterPart",
    "BaseId",
    "FileId",
    "LayerRow",
    "Manifest",
    "Mode",
    "ModelId",
    "ParitySummary",
    "Quantization",
    "Swappable",
    "check_described",
    "check_files",
    "check_graph",
    "file_sha256",
    "read_manifest",
    "read_swappable",
    "sampled_sha256",
    "write_manifest",
]

MANIFEST = "loratrf.json"
_FORMAT = 1

Mode = Literal["merged", "separate", "grouped"]
Quantization = Literal["none", "int4", "int8"]


@dataclass(frozen=True)
class AdapterId:
    """What identifies an adapter: its folder's name, its PEFT kind and the sha256 of its weights file.

    Of one for a model of --adapters also its `task`, and what the `labels` of the head that it brings are called, in
    their order; None in older files.
    """

    name: str
    sha256: str
    peft_type: str
    task: str | None = None
    labels: tuple[str, ...] | None = None

    @classmethod
    def of(cls, adapter: Adapter, task: str | None = None, labels: tuple[str, ...] | None = None) -> AdapterId:
        """That of an adapter that was read."""
        return cls(adapter.name, adapter.sha256, adapter.peft_type, task, labels)


@dataclass(frozen=True)
class AdapterPart:
    """Of the adapter, or of all of a grouped model's: which one (None if several), filter_input, trained values.

    `dora` says whether it is a LORA with magnitudes; older files don't.
    """

    filter_input: str
    parameters: int
    name: str | None = None
    sha256: str | None = None
    peft_type: str | None = None
    dora: bool = False


@dataclass(frozen=True)
class BaseId:
    """The base model's name, and one sha256 over its weights; None where it was a hub's, not a folder."""

    name: str
    sha256: str | None


@dataclass(frozen=True)
class FileId:
    """What identifies a file of weights: its size, its sha256, and `sampled_sha256` for those in a hurry."""

    bytes: int
    sha256: str
    sampled: str

    @classmethod
    def of(cls, path: Path) -> FileId:
        """That of the file at `path`."""
        return cls(path.stat().st_size, file_sha256(path), sampled_sha256(path))


@dataclass(frozen=True)
class ModelId:
    """The sha256 of the graph's file, model.onnx, and the files of weights beside it by name; none in older files."""

    sha256: str
    files: dict[str, FileId] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if foreign := [name for name in self.files if name in ("", "..") or name != Path(name).name]:
            raise ValueError(foreign[0])

    @classmethod
    def of(cls, model: Path, others: Sequence[str] = ()) -> ModelId:
        """That of the model at `model`, whose files of weights are called as it is, and something behind a dot; and of
        `others`, which run with it."""
        own = (f"{model.name}.", f"{model.name}_data")
        beside = sorted(path for path in model.parent.iterdir() if path.name.startswith(own) or path.name in others)
        return cls(file_sha256(model), {path.name: FileId.of(path) for path in beside})


@dataclass(frozen=True)
class LayerRow:
    """What became of an adapted layer: the operator behind it, or "merged"; ranks are those that stay in the graph."""

    module: str
    op: str
    rank: int = 0
    filter_rank: int = 0
    in_features: int | None = None
    out_features: int | None = None

    def __post_init__(self) -> None:
        if self.op not in {*FUNCTIONS, "merged"}:
            raise ValueError(self.op)


@dataclass(frozen=True)
class ParitySummary:
    """What the proof found when the model was exported; each of `checks` is a row as `ParityReport` writes it."""

    passed: bool
    tolerance: float
    inputs: int
    checks: tuple[dict[str, str | int | float | bool | None], ...] = ()


@dataclass(frozen=True)
class Swappable:
    """What a model takes at run time: graph inputs that are `weights` of an adapter, and what it computes without one.

    `file` is the .onnx_adapter beside it. In a grouped model there is one per adapter instead: `slots` has its
    adapters' slots by name, and each of `weights` a leading dimension of slots (`runtime.slots`). `base_parameters` are
    all of the base's, with their shapes: what a further adapter's config is held against. Empty in older files. `tasks`
    are those of a model of several, with a head each on the one trunk that the graph calls `trunk`; empty otherwise.
    """

    default: Default
    weights: tuple[RuntimeWeight, ...]
    file: str | None = None
    slots: dict[str, int] = field(default_factory=dict)
    adapters: dict[str, AdapterId] = field(default_factory=dict)
    base_parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tasks: dict[str, TaskPart] = field(default_factory=dict)
    trunk: str = ""

    def __post_init__(self) -> None:
        if list(self.slots.values()) != list(range(len(self.slots))):
            raise ValueError(f"slots {self.slots}")

    @property
    def known_parameters(self) -> dict[str, tuple[int, ...]]:
        """`base_parameters`; of an older file those that the model takes alone, and their shapes say little."""
        known: dict[str, tuple[int, ...]] = {
            f"{weight.module}.{'weight' if weight.in_layer else weight.part}": (1, 1) for weight in self.weights
        }
        return self.base_parameters or known

    def known_to(self, task: TaskPart | None) -> dict[str, tuple[int, ...]]:
        """`known_parameters` by the names that an adapter of `task` has for them; None is the only one."""
        return task.own(self.known_parameters, self.trunk) if task else self.known_parameters


@dataclass(frozen=True)
class Manifest:
    """The content of loratrf.json. `loratrf_deploy` is the version that wrote it, `versions` are other packages'.

    `library_sha256` is that of the custom-op library put into the folder: it tells a change, and is no ground to trust
    the library, since whoever changes the one can change the other. `companions` are the sha256 of the files that the
    export wrote beside model and adapters, such as config.json: the next one may replace these. None in older files.
    `keep_float` are layers that stayed in float32 beside quantised ones. A `portable` graph has the definitions of the
    loratrf operators in their place. `embedding` says how the output sentence_embedding is made of the tokens; None
    where there is none.
    """

    loratrf_deploy: str
    mode: Mode
    task: str
    dtype: DType
    opset: int
    versions: dict[str, str]
    adapter: AdapterPart
    base: BaseId
    model: ModelId
    layers: tuple[LayerRow, ...]
    parity: ParitySummary | None = None
    quantize: Quantization = "none"
    keep_float: tuple[str, ...] = ()
    portable: bool = False
    device: Device = "cpu"
    swappable: Swappable | None = None
    library_sha256: str | None = None
    companions: dict[str, str] | None = None
    embedding: Embedding | None = None

    @property
    def summary(self) -> str:
        """How the model was exported, on one line: mode, quantisation, type, opset, task, embedding."""
        but = f" but for {len(self.keep_float)} layers" if self.keep_float else ""
        quantized = "" if self.quantize == "none" else f"{self.quantize} weights{but}, "
        embedding = f", {self.embedding.summary}" if self.embedding else ""
        portable = "portable, " if self.portable else ""
        return f"{self.mode}, {portable}{quantized}{self.dtype}, opset {self.opset}, {self.task}{embedding}"

    @property
    def operators(self) -> dict[str, int]:
        """Number of adapted layers by what became of them."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.op] = counts.get(layer.op, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """As parsing what is written gives it: lists for tuples."""
        return json.loads(json.dumps({"format": _FORMAT, **asdict(self)}))


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes loratrf.json into `folder`."""
    (folder / MANIFEST).write_text(json.dumps(manifest.to_dict(), indent=2) + "\n")


def read_manifest(path: Path) -> Manifest:
    """What an export wrote to the loratrf.json at `path`, every field checked. Raises UserError."""
    raw = read_regular(path)
    try:
        content = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}). Export the model again with loratrf-export.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path} has the format {found!r}, and this version of loratrf-deploy reads {_FORMAT}. Update "
            "loratrf-deploy, or export the model again."
        )
    try:
        return decode(Manifest, content)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}. Export the model again.") from error


def read_swappable(model: str | Path) -> tuple[Manifest, Swappable]:
    """What the model at `model` takes at run time, from the loratrf.json beside it.

    Raises UserError where there is none, it describes another file, or the model takes no adapters.
    """
    model = Path(model)
    if not os.path.isfile(model):
        raise UserError(f"No model at {model}: expected a model.onnx of loratrf-export --swappable.")
    path = model.with_name(MANIFEST)
    if not os.path.isfile(path):
        raise UserError(f"{model} has no {MANIFEST} beside it, which says what adapters it takes. Keep them together.")
    manifest = read_manifest(path)
    if manifest.swappable is None:
        raise UserError(f"{model} takes no adapters at run time. Export it with --swappable base (or adapter).")
    check_graph(model, manifest)
    return manifest, manifest.swappable


def check_graph(model: Path, manifest: Manifest) -> None:
    """UserError where the file `model` is not the graph that the `manifest` beside it describes."""
    if manifest.model.sha256 != file_sha256(model):
        raise UserError(
            f"{model} is not the file that {MANIFEST} describes: it was changed or replaced after the export. Export "
            "it again."
        )


def check_files(folder: Path, manifest: Manifest, *, whole: bool = False) -> None:
    """Whether the files of weights in `folder` are those that its `manifest` describes.

    Sizes and samples of their bytes, all of them with `whole`. A manifest of an older version describes none. Raises
    UserError where one is missing or another.
    """
    for name, expected in manifest.model.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, and the model's weights are in it. Keep an export's files together.")
        size = path.stat().st_size
        if size != expected.bytes:
            found = f"it has {size} bytes, expected {expected.bytes}"
        elif whole and (digest := file_sha256(path)) != expected.sha256:
            found = f"its sha256 is {digest[:12]}, expected {expected.sha256[:12]}"
        elif not whole and sampled_sha256(path) != expected.sampled:
            found = "its bytes are others"
        else:
            continue
        raise UserError(
            f"{path} is not the file that {MANIFEST} describes: {found}. It was changed, cut off or replaced after the "
            "export. Copy the folder again, or export the model again."
        )


def check_described(model: Path) -> None:
    """`check_files`, whole, of a model whose graph is the one that the loratrf.json beside it describes.

    Of another graph, made of the export later, it says nothing.
    """
    path = model.with_name(MANIFEST)
    if path.is_file() and (manifest := read_manifest(path)).model.sha256 == file_sha256(model):
        check_files(model.parent, manifest, whole=True)


_SAMPLES, _SAMPLE = 1024, 1024


def sampled_sha256(path: Path) -> str:
    """The sha256 of a file's size and 1024 pieces of 1024 bytes, evenly spaced, the first and the last among them.

    In milliseconds whatever the size. Any change of a stretch longer than a 1024th of the file shows, a small one only
    where it meets a piece: it tells a file that was cut off, or another export's, and nothing that somebody hid. Raises
    UserError where the file can't be read.
    """
    with open_regular(path) as file, readable(path):
        size = file.raw.seek(0, 2)
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        last = max(size - _SAMPLE, 0)
        # A set: the pieces of a small file overlap, and are its whole content.
        for start in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
            file.raw.seek(start, 0)
            digest.update(file.raw.read(_SAMPLE) or b"")
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal. Raises UserError where it can't be read."""
    digest = hashlib.sha256()
    with open_regular(path) as file, readable(path):
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
