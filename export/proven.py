"""What every export goes through: written aside, proven against PyTorch, moved into place."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..errors import UserError
from ..formats.manifest import MANIFEST, file_sha256
from ..pytorch.base import load_tokenizer, sample_inputs
from ..pytorch.quiet import quiet
from ..version import __version__
from .files import base_sha256, written_aside

if TYPE_CHECKING:
    import torch

    from ..parity.single import ParityReport
    from ..pytorch.base import BaseModel

__all__ = [
    "Clock",
    "ExportResult",
    "ParityFailed",
    "check_opset",
    "collector_off",
    "common_facts",
    "traced_inputs",
    "write_companions",
    "write_proven",
]


@dataclass(frozen=True)
class ExportResult:
    """What an export made. `manifest` is loratrf.json's content, `seconds` the time by stage."""

    model: Path
    manifest: dict[str, Any]
    parity: ParityReport | None
    sizes: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)


class ParityFailed(Exception):
    """The exported model doesn't compute what PyTorch computed; `report` says where. Nothing was written."""

    def __init__(self, report: ParityReport):
        super().__init__("the exported model doesn't compute what PyTorch computed")
        self.report = report


def write_proven(
    out: Path,
    write: Callable[[Path, Clock], dict[str, Any]],
    prove: Callable[[Path, dict[str, Any]], ParityReport] | None,
    step: Callable[[str], None],
) -> ExportResult:
    """Writes a model aside, proves it, and moves it into place with its manifest.

    `write` writes the model and what belongs to it beside the path that it is given, and returns the manifest; `prove`
    is given both, None skips the proof. Raises ParityFailed where the proof fails, UserError where `out` can't be
    written; then nothing is left behind.
    """
    with written_aside(out) as aside:
        model, clock = aside / out.name, Clock(step)
        report = None
        with quiet():
            manifest = write(model, clock)
            _write_manifest(aside, manifest)
            if prove:
                gc.collect()  # the traced graph is full of cycles, and the proof needs its room
                clock("checking parity with PyTorch")
                report = prove(model, manifest)
                if not report.passed:
                    raise ParityFailed(report)
                manifest["parity"] = report.summary()
        clock("writing")
        _write_manifest(aside, manifest)
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
    clock("done")
    return ExportResult(out, manifest, report, sizes, clock.seconds)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def check_opset(opset: int | None) -> int:
    """`opset`, or the default for None. Raises UserError for one that can't be exported."""
    from .graph import DEFAULT_OPSET, OPSETS

    opset = DEFAULT_OPSET if opset is None else opset
    if opset not in OPSETS:
        raise UserError(f"--opset is {opset}, expected {OPSETS[0]} to {OPSETS[-1]} (default {DEFAULT_OPSET}).")
    return opset


def traced_inputs(base: BaseModel, dtype: str) -> dict[str, torch.Tensor]:
    """What a model is traced with: random inputs, floats in `dtype`."""
    import torch

    arrays = sample_inputs(base, batch=2, sequence=16, seed=0)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return {name: x.to(getattr(torch, dtype)) if x.is_floating_point() else x for name, x in tensors.items()}


def common_facts(base: BaseModel, out: Path, mode: str, dtype: str, opset: int) -> dict[str, Any]:
    """What every kind of export's manifest says of the model written to `out`; "adapter" and "layers" are to come."""
    return {
        "format": 1,
        "loratrf_deploy": __version__,
        "mode": mode,
        "task": base.task,
        "dtype": dtype,
        "opset": opset,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "onnx_ir")},
        "adapter": {},
        "base": {"name": Path(base.path).name, "sha256": base_sha256(Path(base.path))},
        "model": {"sha256": file_sha256(out)},
        "layers": [],
        "parity": None,
    }


def write_companions(base: BaseModel, adapter: Adapter, folder: Path) -> None:
    """config.json, and the tokenizer (the adapter's own where it has one) or the image preprocessor's settings."""
    base.model.config.save_pretrained(folder)
    if "input_ids" in base.input_names:
        own = (adapter.path / "tokenizer_config.json").is_file()
        if tokenizer := load_tokenizer(adapter.path if own else base.path):
            # What the tokenizer returns is what the graph takes: a caller passes it on as it is.
            tokenizer.model_input_names = list(base.input_names)
            tokenizer.save_pretrained(folder)
    elif (preprocessor := Path(base.path) / "preprocessor_config.json").is_file():
        shutil.copy(preprocessor, folder)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Switches Python's cycle collector off: walking the millions of live objects of a trace takes 15 % of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Clock:
    """Tells `step` what begins and keeps how long each stage took, in seconds."""

    def __init__(self, step: Callable[[str], None]):
        self.seconds: dict[str, float] = {}
        self._step, self._stage, self._begin = step, "", time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._begin
        self._stage, self._begin = stage, now
        self._step(stage)
