"""What there is to time of an exported model: the base, an adapter, an adapter a row; a run, a prompt, a token."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from subprocess import run as run_process
from typing import Any

import numpy as np

from ..errors import UserError
from ..formats.adapter_file import SUFFIX
from ..formats.manifest import MANIFEST, Manifest, read_manifest
from ..formats.settings import read_settings
from ..formats.stages import stages_of
from ..genai.folder import decoder_config, read_config
from ..ops.schemas import Device
from ..runtime.adapter_session import AdapterSession
from ..runtime.generation_session import GenerationSession
from ..runtime.session import PROVIDERS, create_session, quiet_options
from ..runtime.staged_session import StagedSession
from .rows import random_prompts, random_rows

__all__ = ["Deployment", "Setting", "deployments", "model_file", "peak_megabytes"]


@dataclass(frozen=True)
class Setting:
    """How models are run: `threads` of ONNX Runtime's (0, as many as cores), the new tokens of a text, the device."""

    threads: int = 0
    tokens: int = 16
    library: bool = True
    device: Device = "cpu"


@dataclass(frozen=True)
class Deployment:
    """One thing to time: `calls[part](rows)` for rows that `rows(batch, sequence, rng)` draws.

    An encoder has the part "run". A model that generates has "first", a prompt and one token, and "more", the same and
    the setting's tokens after it.
    """

    name: str
    rows: Callable[[int, int, np.random.Generator], Any]
    calls: Mapping[str, Callable[[Any], Any]]

    @property
    def generates(self) -> bool:
        """Whether it makes texts."""
        return "first" in self.calls


def model_file(path: Path) -> Path:
    """The graph of an export: `path` itself, or the model.onnx in the folder `path`. Raises UserError."""
    model = path / "model.onnx" if path.is_dir() else path
    if not model.is_file():
        raise UserError(f"No model at {model}: expected a model.onnx of loratrf-export, or the folder that it is in.")
    return model


def deployments(name: str, model: Path, adapters: Mapping[str, Path], setting: Setting) -> list[Deployment]:
    """What can be timed of the export at `model`, as it is opened here.

    `adapters` are .onnx_adapter files by name, for a model that takes some; without any, those that lie beside it are
    taken, which it was exported with. Raises UserError where it isn't as it was exported, or can't be opened.
    """
    manifest = read_manifest(model.with_name(MANIFEST)) if model.with_name(MANIFEST).is_file() else None
    swappable = manifest.swappable if manifest else None
    if swappable is None and adapters:
        raise UserError(f"{model} takes no adapters at run time: time it without --adapter.")
    if not adapters and swappable:
        beside = [f"{name}{SUFFIX}" for name in swappable.slots] or [str(swappable.file)]
        adapters = {Path(name).stem: model.with_name(name) for name in beside if model.with_name(name).is_file()}
    if decoder_config(model) is not None:
        return _generation(name, model, adapters, manifest, setting)
    if stages_of(model) is not None:
        return [_staged(name, model, setting)]
    return _encoder(name, model, adapters, manifest, setting)


def _encoder(
    name: str, model: Path, adapters: Mapping[str, Path], manifest: Manifest | None, setting: Setting
) -> list[Deployment]:
    opened: dict[str, Any] = {
        "library": setting.library,
        "providers": [PROVIDERS[setting.device]],
        "options": quiet_options(setting.threads),
    }
    calls: dict[str, Callable[[Any], Any]] = {}
    if manifest is None or manifest.swappable is None:
        fixed = create_session(model, **opened)
        inputs = fixed.get_inputs()
        calls[name] = partial(fixed.run, None)
    else:
        session = AdapterSession(model, **opened)
        inputs = session.inputs

        def call(which: Callable[[int], dict[str, Any]]) -> Callable[[Any], Any]:
            return lambda rows: session.run(rows, **which(len(next(iter(rows.values())))))

        for label, which in _choices(session, adapters, grouped=bool(manifest.swappable.slots)).items():
            calls[f"{name}, {label}"] = call(which)

    def rows(batch: int, sequence: int, rng: np.random.Generator) -> Any:
        return random_rows(model.parent, inputs, batch, sequence, rng)

    return [Deployment(label, rows, {"run": call}) for label, call in calls.items()]


def _generation(
    name: str, model: Path, adapters: Mapping[str, Path], manifest: Manifest | None, setting: Setting
) -> list[Deployment]:
    session = GenerationSession(model, threads=setting.threads)
    choices: dict[str, Callable[[int], dict[str, Any]]] = {name: lambda rows: {}}
    if session.takes_adapters:
        grouped = bool(manifest and manifest.swappable and manifest.swappable.slots)
        choices = {f"{name}, {label}": own for label, own in _choices(session, adapters, grouped=grouped).items()}
    settings = read_config(model.parent)["model"]

    def rows(batch: int, sequence: int, rng: np.random.Generator) -> Any:
        return random_prompts(settings, batch, sequence, rng)

    def call(which: Callable[[int], dict[str, Any]], count: int) -> Callable[[Any], Any]:
        return lambda rows: session.generate_tokens(rows, **which(len(rows)), max_new_tokens=count, stop=False)

    return [
        Deployment(label, rows, {"first": call(which, 1), "more": call(which, 1 + setting.tokens)})
        for label, which in choices.items()
    ]


def _staged(name: str, model: Path, setting: Setting) -> Deployment:
    session = StagedSession(model, library=setting.library, threads=setting.threads)
    settings = read_settings(model.with_name("config.json"))

    def rows(batch: int, sequence: int, rng: np.random.Generator) -> Any:
        if (spectrogram := session.spectrogram) is not None:
            # `sequence` frames; the model pads them to as many as it takes at once, and is as slow for few as for many.
            return list(0.1 * rng.standard_normal((batch, sequence * spectrogram.hop_length), dtype=np.float32))
        return random_prompts(settings, batch, sequence, rng)

    def call(count: int) -> Callable[[Any], Any]:
        return lambda rows: session.generate_rows(rows, max_new_tokens=count, stop=False)

    return Deployment(name, rows, {"first": call(1), "more": call(1 + setting.tokens)})


def _choices(
    session: Any, adapters: Mapping[str, Path], *, grouped: bool
) -> dict[str, Callable[[int], dict[str, Any]]]:
    """What of a session that takes adapters is timed: label -> the arguments for so many rows."""
    for name, path in adapters.items():
        session.load(name, path)
    names = list(adapters)
    if not grouped:
        named: dict[str, Callable[[int], dict[str, Any]]] = {
            f"adapter {name}": partial(lambda name, rows: {"adapter": name}, name) for name in names
        }
        if session.default == "required":
            if not named:
                raise UserError(
                    "This model needs an adapter in every run (--swappable required), and none lies beside it. Name "
                    "one: --adapter NAME=FILE."
                )
            return named
        return {session.default: lambda rows: {"adapter": None}, **named}
    return {"base": lambda rows: {"adapters": [None] * rows}} | (
        {"an adapter a row": lambda rows: {"adapters": list(islice(cycle(names), rows))}} if names else {}
    )


_PEAK = """
import json, sys
from pathlib import Path
import numpy as np
from loratrf_deploy.bench.deployments import Setting, deployments
import resource
model, adapters, setting, batch, sequence = json.loads(sys.argv[1])
for one in deployments("", Path(model), {name: Path(file) for name, file in adapters.items()}, Setting(**setting)):
    rows = one.rows(batch, sequence, np.random.default_rng(0))
    for call in one.calls.values():
        call(rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e3 if sys.platform == "linux" else 1e6))
"""


def peak_megabytes(
    model: Path, adapters: Mapping[str, Path], setting: Setting, batch: int, sequence: int
) -> float | None:
    """The most memory that a process of its own takes, which opens the model and runs it; None where it isn't told."""
    arguments = [str(model), {name: str(file) for name, file in adapters.items()}, asdict(setting), batch, sequence]
    done = run_process([sys.executable, "-c", _PEAK, json.dumps(arguments)], capture_output=True, text=True)
    return float(done.stdout) if done.returncode == 0 else None
